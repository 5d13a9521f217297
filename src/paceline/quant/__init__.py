"""Block formats: the slow NumPy twins of the native packer and matrix kernels."""
