"""Corpus preparation: text in, a corpus folder as `pretrain/shards.py` describes it out."""
