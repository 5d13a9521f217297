"""Gemma 4 in PyTorch: `gemma4` (targets), `drafter` (their MTP drafters), and the operations both are made of.

Needs the `torch` extra. Serves the PyTorch backend, training and parity tests.
"""
