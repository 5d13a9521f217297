"""`paceline train`: trains a drafter for a target on the target's own text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli import options as opt
from paceline.errors import SettingsError
from paceline.quant.recipes import METAVAR


def train(
    target: Annotated[str, typer.Argument(help=f"The model to draft for. {opt.MODEL_HELP}", metavar="TARGET")],
    out: Annotated[Path, typer.Argument(help="The folder to create; it must not exist.", metavar="OUT")],
    start: Annotated[
        str, typer.Option("--from", help="A drafter to start from; default: a new one.", metavar="DRAFTER")
    ] = "",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts for the target, one per line (UTF-8). Default, without --text: short ones that come with "
            "paceline.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file (UTF-8) of the kind that the model is for: the target continues pieces of it. Give the "
            "option once for each.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the target's text to train on.", min=1024)] = 400_000,
    length: Annotated[int, typer.Option(help="Tokens of each text at most.", min=32, max=2048)] = 512,
    minutes: Annotated[float, typer.Option(help="Time of training, after the target's text is there.", min=0.01)] = 60,
    hidden_size: Annotated[
        int | None, typer.Option(help="Width of a new drafter; default: as official ones.", min=16, show_default=False)
    ] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Width of its MLPs; default: 8 times that.", min=16, show_default=False)
    ] = None,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a new drafter can propose, the likeliest ones; default: all. Other programs cannot read "
            "such a head.",
            min=64,
            show_default=False,
        ),
    ] = None,
    budget: Annotated[float, typer.Option(help="Disk that the captured text may take meanwhile, in GB.", min=0.0)] = 8,
    quant: Annotated[
        str, typer.Option(help="Weight format of the target that the drafter is for.", metavar=f"auto|{METAVAR}")
    ] = "auto",
    threads: opt.ThreadsOption = None,
    device: Annotated[
        str, typer.Option(help="Where to train: cpu, cuda, or another device of PyTorch.", metavar="DEVICE")
    ] = "cpu",
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0, max=(1 << 32) - 1)] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a plot of loss and acceptance by depth to this PNG file.", show_default=False),
    ] = None,
) -> None:
    """Train a drafter for a model, on text that the model writes itself.

    For a model that has no drafter, or that was fine-tuned since (--from). The
    target writes texts, what it does is captured, and the drafter is fitted to
    it. Stopped at any moment, the same command goes on from there. The last
    line on stdout is JSON.

    \b
    Examples:
      paceline train ./my-model ./my-drafter --text notes.txt
      paceline train ./my-gemma-4-E2B-it ./my-drafter --from google/gemma-4-E2B-it-assistant
      paceline generate -m ./my-model --drafter ./my-drafter "Why is the sky blue?"
    """
    from paceline.backends.formats import check_quant
    from paceline.bench import report
    from paceline.cli.progress import progress_bar
    from paceline.cli.texts import read_texts

    try:
        from paceline.train.training import Settings, Training
    except ImportError as error:
        raise SettingsError(f"training needs {error.name}; pip install 'paceline[train]'") from error

    check_quant(quant)
    if plot:
        report.check_plot(plot)
    listed = read_texts({str(prompts): prompts} if prompts else {})
    documents = read_texts({str(path): path for path in text or ()})
    settings = Settings(
        target=target,
        start=start,
        quant=quant,
        tokens=tokens,
        length=length,
        minutes=minutes,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        draft_vocabulary=draft_vocabulary,
        seed=seed,
        data=(*listed, *documents) or ("paceline's own prompts",),
    )
    with progress_bar("") as progress:
        training = Training(
            settings=settings,
            out=out,
            lines=[line for line in listed[str(prompts)].splitlines() if line.strip()] if prompts else None,
            documents=list(documents.values()),
            budget=budget * 1e9,
            threads=threads,
            device=device,
            notify=opt.note,
            progress=progress,
        )
        found = training.run()
    for when, measured in found["acceptance"].items():
        for sampling, one in measured.items():
            depths = ", ".join(f"{share:.0%}" for share in one["by_depth"])
            print(f"{when}, {sampling}: {one['tokens_a_round']:.2f} tokens a round with 4 drafts ({depths})")
    print(f"{out}: use it with --drafter {out}")
    print(json.dumps(found, ensure_ascii=False))
    if plot:
        report.plot_training(found, plot)
