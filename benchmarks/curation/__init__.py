"""What curation finds, keeps and destroys, one topic per module. `benchmarks/curation_quality.py` runs them.

A topic has a function `measure(corpora)`: it takes the folder that holds the text (`train/SOURCE.jsonl`, records with
`text` and `lang`), and returns one `Figure` for each measured value.
"""
