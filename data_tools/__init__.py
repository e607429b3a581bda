"""Corpus preparation: reads text, and writes a corpus folder as described in `pretrain/corpus/shards.py`."""

import os

# Set before numpy is imported. Matrix products are rare here, and every process would start threads for them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
