"""`paceline convert`: writes a self-contained folder of packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli import options as opt
from paceline.quant.recipes import DEFAULT, METAVAR


def convert(
    model: Annotated[str, typer.Argument(help=opt.MODEL_HELP, metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="The folder to create; it must not exist.", metavar="OUT")],
    quant: Annotated[str, typer.Option(help="Weight format.", metavar=METAVAR)] = DEFAULT,
    drafter: opt.DrafterOption = "auto",
    threads: opt.ThreadsOption = None,
) -> None:
    """Pack a model and its drafter into a new folder.

    The folder loads like any model, but faster, and needs neither the original
    files nor the hub.

    \b
    Examples:
      paceline convert google/gemma-4-E2B-it ./e2b-q4
      paceline generate -m ./e2b-q4 "Why is the sky blue?"
    """
    from paceline.backends.cpu.backend import default_threads
    from paceline.backends.cpu.convert import convert as run
    from paceline.checkpoint import locate, locate_drafter

    place = locate(model, opt.note)
    found = locate_drafter(model, place, drafter, opt.note)
    bits = run(place, found, out, quant, threads or default_threads())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    drafted = "with its drafter" if found else "without a drafter"
    print(f"{out}: {quant}, {bits:.2f} bits a weight, {size / 1e9:.2f} GB, {drafted}")
