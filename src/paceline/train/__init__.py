"""Training of small Gemma 4 pairs, `tiny-python` being the one that is bundled. Needs the `torch` extra.

python -m paceline.train.tiny_python --out DIR --minutes N
"""
