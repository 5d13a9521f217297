"""Options of sampling, gathered: what the command line says of it, over the model's own settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.errors import SettingsError

if TYPE_CHECKING:
    from paceline.types import SamplingParams

_PANEL = "Sampling (the model's own settings where not given)"


def _option(text: str, metavar: str = "NUMBER") -> object:
    return typer.Option(help=text, metavar=metavar, show_default=False, rich_help_panel=_PANEL)


TemperatureOption = Annotated[float | None, _option("0 always takes the most likely token; 1 samples as trained.")]
TopKOption = Annotated[int | None, _option("Only the K most likely tokens; 0 for all.", "K")]
TopPOption = Annotated[float | None, _option("Only the most likely tokens that hold this share; 1 for all.")]
MinPOption = Annotated[float | None, _option("Only tokens this likely compared with the best; 0 for all.")]
RepetitionOption = Annotated[float | None, _option("Above 1: tokens of prompt and text become less likely.")]
PresenceOption = Annotated[float | None, _option("Subtracted from logits of tokens that are in the text.")]
FrequencyOption = Annotated[float | None, _option("The same for each time they are in it.")]
BiasOption = Annotated[list[str] | None, _option("Add to a token's logit; may be given again.", "ID=NUMBER")]
SeedOption = Annotated[int | None, _option("Same seed, same text; random and reported if not given.", "N")]
StopOption = Annotated[list[str] | None, _option("End the text before this; may be given again.", "TEXT")]


def sampling_of(model: SamplingParams, **given: object) -> SamplingParams:
    """The model's settings with those that were given in their place.

    Args:
        model: what the checkpoint recommends.
        given: fields of `SamplingParams`, None where the option was not given; `bias` as the words of --logit-bias.
    """
    changed = {name: value for name, value in given.items() if value is not None}
    if "bias" in changed:
        words = changed["bias"]
        assert isinstance(words, list)
        changed["bias"] = tuple(_bias(word) for word in words)
    return replace(model, **changed)  # type: ignore[arg-type]


def _bias(word: str) -> tuple[int, float]:
    token, _, value = word.partition("=")
    try:
        bias = int(token), float(value)
    except ValueError:
        bias = -1, math.nan
    if math.isnan(bias[1]):
        raise SettingsError(f"--logit-bias is {word!r}; give a token id and a number, such as 506=-5")
    return bias
