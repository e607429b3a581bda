"""Corpus preparation: text in, a corpus folder as `pretrain/corpus/shards.py` describes it out."""

import os

# Before numpy is imported: its matrix products are hardly used here, and each process would start threads for them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
