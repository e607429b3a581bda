"""What each rank reads at each step: the order of samples as a pure function, and the loader that follows it.

`order` maps a global sample index to a place in the corpus, `lanes` spreads it over ranks, `sequences` cuts and packs
the tokens, and `loader` gives `Batch`es, which `workers` read ahead in processes of their own.
"""
