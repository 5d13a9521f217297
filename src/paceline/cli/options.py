"""Options that several verbs share, and the loading of a model with them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.errors import SettingsError

if TYPE_CHECKING:
    from paceline import Engine
    from paceline.engine.engine import DraftTokens

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
DraftTokensOption = Annotated[
    str,
    typer.Option(
        help="Tokens to draft in each round: a number (0 is plain decoding), or auto for as many as pay on this "
        "machine and this text.",
        metavar="auto|N",
    ),
]
MaxTokensOption = Annotated[int, typer.Option(help="Stop after this many tokens.", min=1)]
QuantOption = Annotated[
    str,
    typer.Option(
        help="Weights in memory: f32 as the reference, bf16 as in the files, q8 and q4 smaller and faster; auto "
        "chooses for this machine.",
        metavar="auto|f32|bf16|q8|q4",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="cpu for paceline's own kernels; cuda or another device through PyTorch.",
        metavar="cpu|cuda|torch:DEVICE",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Processor threads; one per core if not given.", min=1, show_default=False)
]


def draft_tokens_of(text: str) -> DraftTokens:
    """The value of --draft-tokens.

    Raises:
        SettingsError: neither a number nor auto.
    """
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise SettingsError(f"--draft-tokens is {text!r}; give a number, or auto") from None


def load(
    model: str, drafter: str, quant: str, threads: int | None, draft_tokens: DraftTokens, device: str = "cpu"
) -> Engine:
    """Load a pair; notices go to stderr."""
    import paceline  # here, so that `paceline --help` starts at once

    return paceline.load(
        model,
        drafter=drafter,
        device=device,
        quant=quant,
        threads=threads,
        draft_tokens=draft_tokens,
        notify=note,
    )


def note(line: str) -> None:
    """A one-line notice, on stderr."""
    print(f"paceline: {line}", file=sys.stderr, flush=True)
