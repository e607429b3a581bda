"""Text from a trained model: sampling, batches with a KV cache, streamed text, and a small HTTP server."""
