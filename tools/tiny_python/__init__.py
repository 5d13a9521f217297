"""Training of `tiny-python`, the pair that is bundled with paceline. Needs the `torch` extra; run from the repository.

python -m tools.tiny_python --out DIR --minutes N
"""
