"""What an indexed draft head cannot draft: how much of a real model's probability lies outside of the chosen lists.

    python bench/head_index.py gemma-3-270m.gguf
    python bench/head_index.py gemma-3-270m.gguf mine.txt --tokens 500

The model's own head gets the index that large dense draft heads get (`backends/cpu/head_index.py`), and the model reads
texts: paceline's own, or files. For each position: the probability that the model, sampling at temperature 1, top-k 64,
top-p 0.95, takes a token that is not in the lists with the best mean logits; and whether its most likely token is such
a one. A drafter that is always right would lose that share of its accepted tokens; one that is right where the model is
sure, what `_sure` says. Prints a table on stderr and one JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import paceline
from paceline.backends.base import Backend
from paceline.backends.cpu.head_index import CHOSEN, build_index, divides
from paceline.bench.evaluation import Window, passes
from paceline.checkpoint import Checkpoint, locate, resolve
from paceline.checkpoint.names import EMBEDDING, HEAD
from paceline.decode.sampler import allowed
from paceline.errors import PacelineError, SettingsError
from paceline.types import Float32, SamplingParams

SAMPLING = SamplingParams(temperature=1.0, top_k=64, top_p=0.95)
SURE = 0.5  # probability of the most likely token


def lists_of(model: str) -> NDArray[np.int32]:
    """The lists of tokens [lists, tokens of each] of a model's head."""
    checkpoint = Checkpoint.open(locate(model, print))
    config = checkpoint.target_config()
    if not divides(config.vocab_size):
        raise SettingsError(
            f"{model}: {config.vocab_size} tokens are no power of two of lists, so no head like it has any"
        )
    return build_index(resolve(checkpoint, config)[EMBEDDING if config.tied_head else HEAD]).tokens


def reached(logits: Float32, lists: NDArray[np.int32], chosen: int) -> NDArray[np.bool_]:
    """[vocabulary]: the tokens of so many lists, those with the best mean logits."""
    inside = np.zeros(len(logits), bool)
    inside[lists[np.argsort(-logits[lists].mean(1))[:chosen]]] = True
    return inside


def outside(backend: Backend, tokens: Sequence[int], lists: NDArray[np.int32], chosen: int) -> NDArray[np.float64]:
    """[positions, 3]: probability outside of the lists, whether the best token is there, and its probability."""
    found = []
    for _, rows in passes(backend, [Window(0, [*tokens])]):
        for logits in rows:
            ids, weights = allowed(logits, SAMPLING)  # the most likely one first
            missing = ~reached(logits, lists, chosen)[ids]
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
    parser.add_argument("--tokens", type=int, default=2000, help="of each text, at most")
    parser.add_argument("--one-in", type=int, default=CHOSEN, help="lists that is scored (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.one_in < 1:
        parser.error(f"--one-in is {arguments.one_in}; give 1 or more")
    texts = arguments.texts or sorted((Path(paceline.__file__).parent / "assets" / "eval").glob("*.txt"))
    lists = lists_of(arguments.model)
    engine = paceline.load(arguments.model, drafter="none", context=arguments.tokens)
    report: dict[str, dict[str, float | None]] = {}
    everything = []
    for path in texts:
        tokens = engine.tokenizer.encode(path.read_text("utf-8"), bos=True)[: arguments.tokens]
        everything.append(outside(engine.backend, tokens, lists, max(1, len(lists) // arguments.one_in)))
        report[path.name] = figures(everything[-1])
        print(path.name, report[path.name], file=sys.stderr)
    report["all"] = figures(np.concatenate(everything))
    print("all", report["all"], file=sys.stderr)
    about = {"benchmark": "head_index", "model": Path(arguments.model).name, "one_in": arguments.one_in}
    print(json.dumps({**about, "outside_percent": report}))


if __name__ == "__main__":
    try:
        main()
    except (PacelineError, OSError) as error:
        sys.exit(f"head_index: {error}")
