"""Sampling options, made from the declarations in `paceline.sampling_params`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer

from paceline.errors import SettingsError
from paceline.sampling_params import PARAMETERS

Changes = dict[str, Any]  # fields of `SamplingParams` that were given


def _option(text: str, metavar: str) -> Any:
    panel = "Sampling (default: the model's own settings)"
    return typer.Option(help=text, metavar=metavar, show_default=False, rich_help_panel=panel)


StopOption = Annotated[
    list[str] | None, _option("End the text before this string; may be given more than once.", "TEXT")
]


def with_sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each sampling parameter in place of its argument `sampling`.

    Args:
        command: a typer command; it receives those that were given as `sampling`, see `Changes`.
    """
    options: dict[str, Any] = {
        name: Annotated[parameter.kind | None, _option(parameter.help, parameter.metavar)]
        for name, parameter in PARAMETERS.items()
    }
    options["logit_bias"] = Annotated[
        list[str] | None, _option("Added to a token's logit; may be given more than once.", "ID=NUMBER")
    ]

    @wraps(command)
    def wrapped(**given: Any) -> None:
        changes = {name: value for name in options if (value := given.pop(name)) is not None}
        if words := changes.pop("logit_bias", None):
            changes["bias"] = tuple(_bias(word) for word in words)
        command(**given, sampling=changes)

    parameters: list[Parameter] = []
    for parameter in signature(command, eval_str=True).parameters.values():
        if parameter.name == "sampling":
            keyword = Parameter.KEYWORD_ONLY
            parameters += [Parameter(name, keyword, default=None, annotation=kind) for name, kind in options.items()]
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
    wrapped.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _bias(word: str) -> tuple[int, float]:
    token, _, value = word.partition("=")
    try:
        bias = int(token), float(value)
    except ValueError:
        bias = -1, math.nan
    if math.isnan(bias[1]):
        raise SettingsError(f"--logit-bias is {word!r}; give a token id and a number, such as 506=-5")
    return bias
