"""Triton kernels for NVIDIA GPUs from A100 (8.0) on; its modules need Triton, so `backends` alone imports them."""
