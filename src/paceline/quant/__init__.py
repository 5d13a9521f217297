"""Weight formats: their table, and the NumPy reference of the native packer and matrix kernels."""
