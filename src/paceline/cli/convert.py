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
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Let the model read texts first, and keep those weights most precise that matter most there. It takes "
            "minutes, and memory for the model in its own precision.",
        ),
    ] = False,
    calibration_text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file (UTF-8) to read, of the kind that the model is for; give the option once for each. "
            "Default: short texts that come with paceline. It means --calibrate.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Pack a model and its drafter into a new folder.

    The folder loads like any model, but faster, and needs neither the original
    files nor the hub.

    \b
    Examples:
      paceline convert google/gemma-4-E2B-it ./e2b-q4
      paceline convert google/gemma-4-E2B-it ./e2b-q4 --calibrate
      paceline generate -m ./e2b-q4 "Why is the sky blue?"
    """
    from paceline.backends.cpu.convert import convert as run
    from paceline.backends.cpu.processors import default_threads
    from paceline.checkpoint import locate, locate_drafter
    from paceline.cli.progress import progress_bar
    from paceline.cli.texts import bundled, read_texts

    texts = None
    if calibrate or calibration_text:
        paths = calibration_text or []
        texts = read_texts({str(path): path for path in paths} or bundled("calibration"))
    place = locate(model, opt.note)
    found = locate_drafter(model, place, drafter, opt.note)
    with progress_bar("tokens") as reading:
        done = run(place, found, out, quant, threads or default_threads(), texts=texts, reading=reading)
    if seen := done.calibration:
        print(f"calibrated on {seen.tokens} tokens in {seen.seconds:.0f} s, weights held as {seen.quant} meanwhile")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    drafted = "with its drafter" if found else "without a drafter"
    print(f"{out}: {quant}, {done.bits_per_weight:.2f} bits a weight, {size / 1e9:.2f} GB, {drafted}")
