"""`paceline eval`: what each weight format costs in quality."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline import __version__
from paceline.cli import options as opt
from paceline.cli.progress import progress_bar
from paceline.cli.texts import bundled, read_texts
from paceline.quant.recipes import METAVAR

if TYPE_CHECKING:
    from rich.console import Console

    from paceline import Engine
    from paceline.bench.evaluation import Choice, Evaluation

COLUMNS = ("bits/weight", "perplexity", "KL, nats", "99 % below", "same top token", "tokens/s")


def evaluate(
    model: Annotated[str, typer.Argument(help=opt.MODEL_HELP, metavar="MODEL")],
    text: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Text files (UTF-8) to measure on; default: short ones that come with paceline, of prose, dialogue, "
            "code, a licence and several languages.",
            metavar="[TEXT...]",
            show_default=False,
        ),
    ] = None,
    quant: Annotated[
        list[str] | None,
        typer.Option(
            help="Weight format to measure; give the option once for each. Default: a quantised file as it is, or all "
            "formats smaller than the reference.",
            metavar=f"auto|{METAVAR}",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Weight format, or another model with the same tokens, to compare with; default: the precision of the "
            "model's files, in f32 if they are quantised.",
            metavar=f"{METAVAR}|MODEL",
            show_default=False,
        ),
    ] = None,
    positions: Annotated[
        int, typer.Option(help="Tokens to predict, of all texts together and the same number of each.", min=1)
    ] = 2000,
    context: Annotated[
        int, typer.Option(help="Tokens that the model sees at most before texts are cut.", min=2, max=1 << 20)
    ] = 1024,
    kv: opt.KvOption = "auto",
    threads: opt.ThreadsOption = None,
    device: opt.DeviceOption = "cpu",
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a plot of loss against size and speed to this PNG file.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="No table, only the JSON line.")] = False,
) -> None:
    """Measure what each weight format costs in quality.

    The model reads texts in every format and in the reference's precision, and
    predicts each next token. Shown are the perplexity, the KL divergence of
    the predictions from the reference's, and how often both have the same most
    likely token. The last line on stdout is JSON.

    \b
    Examples:
      paceline eval google/gemma-4-E2B-it
      paceline eval google/gemma-4-E2B-it book.txt --quant q4 --quant q8 --plot loss.png
      paceline eval ./gemma-4-E2B-it-Q4_K_M.gguf --reference google/gemma-4-E2B-it
      paceline eval ./gemma-4-E2B-it-Q4_K_M.gguf --reference auto --kv q8
    """
    from paceline.backends.formats import check_quant
    from paceline.bench import report
    from paceline.bench.evaluation import Evaluation, choose
    from paceline.quant.cache_formats import check_cache_format

    for name in quant or ():
        check_quant(name)
    check_cache_format(kv)
    if plot:
        report.check_plot(plot)
    texts = read_texts({str(path): path for path in text} if text else bundled("eval"))
    against, choices = choose(model, quant or (), reference, kv)
    out = report.console()
    with progress_bar("positions", out) as progress:

        def load(choice: Choice) -> Engine:
            return _load(choice, out, threads=threads, device=device, context=context)

        found = Evaluation(texts, positions, context, load, progress)
        rows = []
        for measured in found.run(against, choices):
            rows.append(found.report(measured))
            if as_json:
                continue
            if len(rows) == 1:
                _print_head(out, model, found)
            _print_row(out, rows[-1], rows[0], kv)
    whole = {"benchmark": "eval", "version": __version__, "model": model, **found.about}
    whole |= {"reference": rows[0], "formats": rows[1:]}
    print(json.dumps(whole, ensure_ascii=False))
    if plot:
        report.plot_losses(whole, plot)


def _load(choice: Choice, out: Console, *, threads: int | None, device: str, context: int) -> Engine:
    import paceline
    from paceline.bench.evaluation import ROWS

    return paceline.load(
        choice.model,
        drafter="none",
        quant=choice.quant,
        kv=choice.kv,
        threads=threads,
        device=device,
        context=context,
        prompt_chunk=ROWS,
        draft_tokens=0,
        notify=lambda line: out.print(f"paceline: {line}", markup=False, soft_wrap=True),
    )


def _print_head(out: Console, model: str, found: Evaluation) -> None:
    out.print(
        f"{model}: {found.positions} positions of {len(found.texts)} texts, at most {found.context} tokens at a time; "
        f"the reference's logits take {found.about['logits_bytes'] / 1e9:.2f} GB of disk until the end",
        markup=False,
        soft_wrap=True,
    )
    out.print(" " * 18 + "".join(f"  {column}" for column in COLUMNS), soft_wrap=True)


def _print_row(out: Console, row: Mapping[str, Any], reference: Mapping[str, Any], kv: str) -> None:
    """One line, under the columns; a console may be narrower, so it is printed as it is."""
    cache = "" if kv == "auto" else f", {row['kv']} cache"
    name = row["quant"] + (" (reference)" if row is reference else cache)

    def shown(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    cells = (
        shown("bits_per_weight", ".2f"),
        shown("perplexity", ".3f"),
        shown("kl_mean", ".5f"),
        shown("kl_99_percent", ".4f"),
        shown("same_top_token", ".1%"),
        shown("tokens_per_s", ".1f"),
    )
    line = "".join(cell.rjust(len(column) + 2) for cell, column in zip(cells, COLUMNS, strict=True))
    out.print(name.ljust(18) + line, markup=False, soft_wrap=True)
