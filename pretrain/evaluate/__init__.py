"""What a trained model is worth: its held-out loss, its scores on tasks, and whether two models differ."""
