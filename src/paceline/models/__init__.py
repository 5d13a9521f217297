"""Gemma 4 in PyTorch: `gemma4` (targets, Gemma 3's too), `drafter` (MTP drafters), and the operations of both.

Needs the `torch` extra. Serves the PyTorch backend, training and parity tests.
"""
