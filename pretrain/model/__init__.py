"""The decoder and its kernels. This package does not depend on loaders, DeepSpeed or runs."""
