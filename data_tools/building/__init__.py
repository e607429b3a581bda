"""Turns text into shards in four stages, each of which can be resumed: gather, train a vocabulary, encode, pack.

`workspace` holds the output folder, and `lineage` records where a corpus came from.
"""
