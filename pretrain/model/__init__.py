"""The decoder and its kernels. It knows nothing of loaders, DeepSpeed or runs."""
