"""Text to shards, in stages that go on where they stopped: gather, train a vocabulary, encode, pack.

`workspace` holds the output folder, and `lineage` records where a corpus came from.
"""
