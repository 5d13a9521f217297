"""Options that several verbs share, and the loading of a model with them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from paceline import Engine

DEFAULT_MODEL = "tiny-python"
MODEL_HELP = "Model folder, hub id such as google/gemma-4-E2B-it, or tiny-python, which comes with paceline."

ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP, metavar="MODEL")]
DrafterOption = Annotated[
    str,
    typer.Option(
        help="The model's MTP drafter: a folder, a hub id, none, or auto for the one named like the model with "
        "-assistant at the end.",
        metavar="auto|none|MODEL",
    ),
]
DraftTokensOption = Annotated[int, typer.Option(help="Tokens to draft in each round; 0 is plain decoding.", min=0)]
MaxTokensOption = Annotated[int, typer.Option(help="Stop after this many tokens.", min=1)]
QuantOption = Annotated[
    str,
    typer.Option(
        help="Weights in memory: f32 as the reference, bf16 as in the files, q8 and q4 smaller and faster; auto "
        "chooses for this machine.",
        metavar="auto|f32|bf16|q8|q4",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Processor threads; one per core if not given.", min=1, show_default=False)
]


def load(model: str, drafter: str, quant: str, threads: int | None, draft_tokens: int) -> Engine:
    """Load a pair; notices go to stderr."""
    import paceline  # here, so that `paceline --help` starts at once

    return paceline.load(model, drafter=drafter, quant=quant, threads=threads, draft_tokens=draft_tokens, notify=_note)


def _note(line: str) -> None:
    print(f"paceline: {line}", file=sys.stderr, flush=True)
