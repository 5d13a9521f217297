"""Options that several commands share."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.errors import PromptError, SettingsError
from paceline.quant.cache_formats import CACHE_FORMATS
from paceline.quant.recipes import DEFAULT, METAVAR, RECIPES

if TYPE_CHECKING:
    from paceline import Engine
    from paceline.engine.engine import DraftTokens

DEFAULT_MODEL = "tiny-python"
MODEL_HELP = (
    "Model folder, GGUF, hub id such as google/gemma-4-E2B-it or org/repository:Q4_K_M, ollama:NAME, or what comes "
    "with paceline: tiny-python, and gemma3-270m with the extra demo."
)

ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP, metavar="MODEL")]
DrafterOption = Annotated[
    str,
    typer.Option(
        help="The model's MTP drafter, named like a model; none disables speculative decoding; auto looks beside the "
        "model for -assistant or mtp in the name.",
        metavar="auto|none|MODEL",
    ),
]
DraftTokensOption = Annotated[
    str,
    typer.Option(
        help="Draft length: a number of tokens (0 is plain decoding), or auto to adapt it to machine and text.",
        metavar="auto|N",
    ),
]
MaxTokensOption = Annotated[int, typer.Option(help="Maximum number of generated tokens.", min=1)]
QuantOption = Annotated[
    str,
    typer.Option(
        help=f"Weight format in memory: {', '.join(f'{f.name} {f.summary}' for f in RECIPES.values())}; "
        f"auto keeps what a GGUF or a small model holds, and takes {DEFAULT} for others.",
        metavar=f"auto|{METAVAR}",
    ),
]
KvOption = Annotated[
    str,
    typer.Option(
        help=f"KV cache format: {', '.join(f'{name} {what}' for name, what in CACHE_FORMATS.items())}; auto is f32 "
        "with f32 weights, else bf16.",
        metavar=f"auto|{'|'.join(CACHE_FORMATS)}",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="cpu for paceline's own kernels; cuda or another device through PyTorch.", metavar="cpu|cuda|torch:DEVICE"
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        help="Processor threads; default: one per performance core, within CPU quotas.", min=1, show_default=False
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        help="Maximum tokens of a sequence; default: the model's limit, at most 32768.", min=2, show_default=False
    ),
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


def load(model: str, *, draft_tokens: str = "auto", **settings: Any) -> Engine:
    """Load a pair with notices on stderr; see `paceline.load`.

    Raises:
        SettingsError: `draft_tokens`, a value of --draft-tokens, is neither a number nor auto; or see `paceline.load`.
    """
    import paceline  # here, so that `paceline --help` starts at once

    return paceline.load(model, draft_tokens=draft_tokens_of(draft_tokens), notify=note, **settings)


def decode_text(data: bytes, source: object) -> str:
    """Decode UTF-8.

    Raises:
        PromptError: it is not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{source}: is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}); "
            "convert it first, for example with iconv -t UTF-8"
        ) from error


def note(line: str) -> None:
    """Print a one-line notice to stderr."""
    print(f"paceline: {line}", file=sys.stderr, flush=True)
