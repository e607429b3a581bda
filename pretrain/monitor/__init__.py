"""What is recorded of a run, and how it is shown: metrics, events, W&B, and progress lines."""
