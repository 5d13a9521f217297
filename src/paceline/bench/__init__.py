"""Measurements of this machine and of models on it; every figure stands beside the machine's own limit."""
