"""What a shortened draft head cannot draft: how much of a real model's probability lies outside of its tokens.

    python bench/short_head.py gemma-3-270m.gguf
    python bench/short_head.py gemma-3-270m.gguf --clusters 2048     # a GGUF; pip install gguf

The model reads texts (paceline's own, or files), with the tokens of a text so far as recent ones, as in
`model/shortlist.hpp`. For each position: the probability that the model, sampling at temperature 1, top-k 64, top-p
0.95, takes a token that the head does not hold; and whether its most likely token is such a one. A drafter that is
always right would lose that share of its accepted tokens; one that is right where the model is sure, what `_sure` says.
With `--clusters` the head holds, too, the tokens of those clusters of its rows whose mean logits are the largest.
Prints a table on stderr and one JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import paceline
from paceline.backends.base import Backend
from paceline.bench.evaluation import Window, passes
from paceline.decode.sampler import allowed
from paceline.errors import PacelineError
from paceline.quant.formats import PANEL
from paceline.types import Float32, SamplingParams

FREQUENT = 8192  # as in `model/drafter.cpp`; no text here has more recent panels than it keeps
SAMPLING = SamplingParams(temperature=1.0, top_k=64, top_p=0.95)
IN_CLUSTERS, STEPS = 4096, 6  # tokens; of k-means
SURE = 0.5  # probability of the most likely token


@dataclass(frozen=True)
class Clusters:
    """Tokens by the cluster that their row of the head belongs to: k-means on the rows' directions."""

    of: NDArray[np.int64]  # [vocabulary]
    tokens: NDArray[np.int64]  # [vocabulary] by cluster
    starts: NDArray[np.int64]  # of each cluster, none of which is empty

    @classmethod
    def found(cls, path: str, count: int) -> Clusters:
        """Of a GGUF file's head."""
        import gguf

        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        tensor = tensors.get("output.weight", tensors["token_embd.weight"])
        rows = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        dice = np.random.default_rng(0)
        centroids = rows[dice.choice(len(rows), count, replace=False)]
        for _ in range(STEPS):
            of = np.concatenate([(part @ centroids.T).argmax(1) for part in np.array_split(rows, 32)])
            tokens = np.argsort(of, kind="stable")
            used, starts = np.unique(of[tokens], return_index=True)
            centroids = np.add.reduceat(rows[tokens], starts)  # those without rows go
            centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
        return cls(np.searchsorted(used, of), tokens, starts)

    def best(self, logits: Float32, most: int) -> NDArray[np.bool_]:
        """[vocabulary]: so many tokens, of whole clusters."""
        sizes = np.diff(np.append(self.starts, len(self.tokens)))
        order = np.argsort(-np.add.reduceat(logits[self.tokens], self.starts) / sizes)
        taken = np.zeros(len(sizes), bool)
        taken[order[sizes[order].cumsum() <= most]] = True
        return taken[self.of]


def outside(backend: Backend, tokens: Sequence[int], clusters: Clusters | None) -> NDArray[np.float64]:
    """[positions, 3]: probability outside of the head, whether the likeliest token is, and that token's probability."""
    panels: set[int] = set()
    found = []
    rows = (row for _, logits in passes(backend, [Window(0, [*tokens])]) for row in logits)
    for token, logits in zip(tokens[:-1], rows, strict=True):
        panels.add(token // PANEL)
        ids, weights = allowed(logits, SAMPLING)  # the most likely one first
        missing = (ids >= FREQUENT) & ~np.isin(ids // PANEL, list(panels))
        if clusters:
            missing &= ~clusters.best(logits, IN_CLUSTERS)[ids]
        found.append((weights[missing].sum() / weights.sum(), missing[0], weights[0] / weights.sum()))
    return np.array(found, np.float64)


def figures(found: NDArray[np.float64]) -> dict[str, float | None]:
    """Shares in per cent."""
    sure = found[found[:, 2] > SURE]
    columns = {"sampled": found[:, 0], "greedy": found[:, 1], "sampled_sure": sure[:, 0], "greedy_sure": sure[:, 1]}
    shares = {name: round(100 * float(column.mean()), 2) if len(column) else None for name, column in columns.items()}
    return {"positions": len(found), **shares}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("texts", nargs="*", type=Path, help="default: paceline's own")
    parser.add_argument("--clusters", type=int, default=0, help=f"and the {IN_CLUSTERS} tokens of the best of so many")
    parser.add_argument("--tokens", type=int, default=2000, help="of each text, at most")
    arguments = parser.parse_args()
    if arguments.clusters and not Path(arguments.model).is_file():
        parser.error(f"--clusters reads a GGUF file, and {arguments.model} is none")
    texts = arguments.texts or sorted((Path(paceline.__file__).parent / "assets" / "eval").glob("*.txt"))
    engine = paceline.load(arguments.model, drafter="none", context=arguments.tokens)
    clusters = Clusters.found(arguments.model, arguments.clusters) if arguments.clusters else None
    report: dict[str, dict[str, float | None]] = {}
    everything = []
    for path in texts:
        tokens = engine.tokenizer.encode(path.read_text("utf-8"), bos=True)[: arguments.tokens]
        everything.append(outside(engine.backend, tokens, clusters))
        report[path.name] = figures(everything[-1])
        print(path.name, report[path.name], file=sys.stderr)
    report["first 256 tokens"] = figures(np.concatenate([found[:256] for found in everything]))
    report["later tokens"] = figures(np.concatenate([found[256:] for found in everything]))
    report["all"] = figures(np.concatenate(everything))
    for name in ("first 256 tokens", "later tokens", "all"):
        print(name, report[name], file=sys.stderr)
    print(
        json.dumps(
            {
                "benchmark": "short_head",
                "model": Path(arguments.model).name,
                "clusters": arguments.clusters,
                "outside_percent": report,
            }
        )
    )


if __name__ == "__main__":
    try:
        main()
    except (PacelineError, OSError) as error:
        sys.exit(f"short_head: {error}")
