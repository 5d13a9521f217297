"""The PyTorch backend: CUDA devices, and any other that PyTorch knows."""
