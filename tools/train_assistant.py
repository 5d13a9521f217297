"""Trains `gemma3-270m-assistant`, the drafter of the real pair that comes with paceline.

    python -m tools.train_assistant OUT [--from DRAFTER] [--tokens N] [--minutes M] [--seed S]

Its target continues three kinds of prompts: paceline's own, beginnings that it wrote itself from nothing, and pieces of
packages of this interpreter's standard library. `bench/acceptance.py` measures on modules outside of packages, and on
texts that are not among these. Stopped, the same command goes on. Prints the report as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import paceline
from paceline.backends.cpu.backend import CpuBackend
from paceline.checkpoint import Checkpoint, demo_model, locate
from paceline.cli.progress import progress_bar
from paceline.engine.engine import Engine
from paceline.sampling_params import or_official
from paceline.train import capture
from paceline.train.texts import bundled_prompts
from paceline.train.training import Settings, Training

TARGET = demo_model.NAME
PACKAGES = (
    "asyncio collections concurrent ctypes email html http importlib json logging multiprocessing pydoc_data tomllib "
    "urllib wsgiref xml zoneinfo"
)
TURNS = 8  # of paceline's own prompts: each time the target goes on in another way
BEGINNINGS, BEGINNING = 1280, 24  # how many the target writes, of how many tokens
LENGTH = 256  # tokens of a text: beyond, so small a model often repeats itself
VOCABULARY, INTERMEDIATE = 16_384, 1_024


def beginnings(engine: Engine, seed: int) -> Iterator[str]:
    """First lines of texts that the target writes from nothing; those of English letters."""
    backend = engine.backend
    assert isinstance(backend, CpuBackend)
    bos = engine.tokenizer.bos_id
    assert bos is not None
    config = Checkpoint.open(locate(TARGET)).target_config()
    own = or_official(engine.sampling)
    recorder = capture.Recorder(backend, config, engine.stop_ids, BEGINNING)
    for first in range(0, BEGINNINGS, backend.info.slots):
        numbers = range(first, min(first + backend.info.slots, BEGINNINGS))
        texts = [capture.Recording([bos], replace(own, seed=(seed << 20) + number)) for number in numbers]
        recorder.record(texts)
        for text in texts:
            line = engine.tokenizer.decode(text.tokens[1:]).strip().partition("\n")[0]
            if line.isascii() and len(line.split()) > 3:
                yield line


def modules() -> list[str]:
    """Sources of the packages, without their tests."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for package in PACKAGES.split() for path in sorted((root / package).rglob("*.py")))
    read = [path for path in paths if "test" not in path.relative_to(root).as_posix()]
    return [path.read_text(encoding="utf-8", errors="ignore") for path in read]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train gemma3-270m-assistant.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--from", dest="start", default="")
    parser.add_argument("--tokens", type=int, default=1_200_000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    engine = paceline.load(TARGET, drafter="none", context=LENGTH, slots=capture.TOGETHER, draft_tokens=0)
    lines = bundled_prompts(engine) * TURNS + list(beginnings(engine, given.seed))
    del engine
    new = not given.start
    settings = Settings(
        target=TARGET,
        start=given.start,
        tokens=given.tokens,
        length=LENGTH,
        minutes=given.minutes,
        seed=given.seed,
        data=(
            "paceline's prompts",
            "the target's beginnings",
            f"Python {sys.version_info.major}.{sys.version_info.minor}: {PACKAGES}",
        ),
        draft_vocabulary=VOCABULARY if new else None,
        intermediate_size=INTERMEDIATE if new else None,
    )
    with progress_bar("") as progress:
        run = Training(
            settings,
            given.out,
            lines,
            modules(),
            budget=8e9,
            notify=lambda line: print(line, file=sys.stderr),
            progress=progress,
        )
        report = run.run()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
