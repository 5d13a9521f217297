"""What it would gain to price a round of a mixture of experts by the experts it will read, instead of by its rows.

    python bench/expert_prices.py

An upper bound, by simulation: one policy knows exactly which experts the rows of each length would read, in every
layer, and takes the length with most tokens per byte; the other knows the mean for each length. Experts are those of
`csrc/cpu/model/simulated_routing.hpp`, in the shape of 26B-A4B; memory is the limit. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from numpy.typing import NDArray

from paceline.bench.shapes import official_target

PLAIN = 2.484e9  # bytes of a q4 pass of one row of 26B-A4B (`pass_bytes` of `paceline bench decode --shape 26b`)
DRAFT_STEP = 0.05  # of a plain pass
MOST = 8  # drafts
BITS = 4.5  # of an expert's weights


def read(overlap: float, positions: int, dice: np.random.Generator) -> NDArray[np.float64]:
    """[positions, MOST + 1]: experts that 1, 2, ... rows from each position read, in all layers."""
    config = official_target("26b")
    experts, layers = config.experts, len(config.layers)
    assert experts
    choices = experts.count // experts.active
    renewal = (1 - overlap) * choices / (choices - 1)
    drawn = dice.integers(0, choices, (positions, layers, experts.active))
    renewed = dice.random(drawn.shape) < renewal
    for at in range(1, positions):
        drawn[at] = np.where(renewed[at], drawn[at], drawn[at - 1])
    counts = np.zeros((positions - MOST, MOST + 1))
    seen = np.zeros((positions - MOST, layers, experts.active, choices), bool)
    for row in range(MOST + 1):
        np.put_along_axis(seen, drawn[row : row + len(seen), :, :, None], True, axis=3)
        counts[:, row] = seen.sum(axis=(1, 2, 3))
    return counts


def speed(
    prices: NDArray[np.float64], believed: NDArray[np.float64], accepted: NDArray[np.int64], gains: NDArray[np.float64]
) -> float:
    """Tokens per byte of a text each of whose rounds takes the length that looks best by `believed` prices."""
    rate = float(1 / believed[:, 0].mean())
    for _ in range(6):  # until it is what a byte is worth
        tokens, spent, at = 0, 0.0, 0
        while at < len(prices):
            length = int((gains - rate * believed[at]).argmax())
            made = 1 + min(int(accepted[at]), length)
            tokens, spent, at = tokens + made, spent + prices[at, length], at + made
        rate = float(tokens / spent)
    return rate


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--positions", type=int, default=6000)
    positions = parser.parse_args().positions
    if positions < 100:
        parser.error(f"--positions is {positions}; give 100 or more")
    config, dice = official_target("26b"), np.random.default_rng(0)
    assert config.experts
    expert = 3 * config.hidden_size * config.experts.intermediate_size * BITS / 8
    gained: dict[str, dict[str, float]] = {}
    for shares in ((0.8, 0.65, 0.5), (0.5, 0.3, 0.2), (0.3, 0.1, 0.0)):
        chances = np.array([1, *shares, *(shares[-1] * 0.75**i for i in range(1, MOST - 2))])
        gains = chances.cumsum() - 1
        for overlap in (0.0625, 0.3, 0.6):  # 0.0625: by chance
            experts = read(overlap, positions, dice)
            prices = PLAIN + expert * (experts - experts[:, :1])
            prices += np.arange(MOST + 1) * DRAFT_STEP * prices[:, 0].mean()
            accepted = (dice.random(len(prices))[:, None] < chances[1:]).sum(axis=1)
            mean = np.broadcast_to(prices.mean(axis=0), prices.shape)
            known, alike = (speed(prices, believed, accepted, gains) for believed in (prices, mean))
            gained.setdefault(str(shares), {})[str(overlap)] = round(known / alike - 1, 4)
    print(json.dumps({"benchmark": "expert_prices", "positions": positions, "gained_at_most": gained}))


if __name__ == "__main__":
    main()
