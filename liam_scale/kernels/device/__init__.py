"""The same mathematics in plain torch by tiles, for every device without kernels of its own (CUDA)."""
