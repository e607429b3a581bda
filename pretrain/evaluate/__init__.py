"""Evaluation of a trained model: its held-out loss, and the text that it generates."""
