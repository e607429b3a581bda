"""What each rank reads at each step: the order of samples as a pure function, and the loader that follows it.

`order` maps a global sample index to a position in the corpus, `lanes` distributes the samples over the ranks,
`sequences` cuts and packs the tokens, and `loader` returns `Batch`es, which `workers` read ahead in separate processes.
"""
