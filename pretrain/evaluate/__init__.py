"""What a trained model is worth: held-out loss, and the text that it writes."""
