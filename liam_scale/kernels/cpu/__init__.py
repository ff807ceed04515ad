"""The kernels on the CPU: numba walks over tiles that stay in a core's cache, and products through oneDNN."""
