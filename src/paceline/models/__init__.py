"""The readable truth, in PyTorch: `gemma4` (targets) and `drafter` (their MTP drafters), one file each.

Needs the `torch` extra. Used for training, parity tests and as the oracle of faster backends.
"""
