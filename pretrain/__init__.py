"""pretrain: raw text to a trained decoder-only language model on DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
