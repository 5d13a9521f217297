"""`paceline verify`: checks that drafting, threads and chunk sizes do not change the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline import __version__
from paceline.cli import options as opt
from paceline.cli.progress import progress_bar
from paceline.errors import SettingsError

if TYPE_CHECKING:
    from rich.console import Console

    from paceline import Engine
    from paceline.bench.audit import Audit, Difference, Run, Speeds, Top


def verify(
    model: Annotated[str, typer.Argument(help=opt.MODEL_HELP, metavar="MODEL")],
    drafter: opt.DrafterOption = "auto",
    quant: opt.QuantOption = "auto",
    kv: opt.KvOption = "auto",
    threads: opt.ThreadsOption = None,
    device: opt.DeviceOption = "cpu",
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts to use, one per line (UTF-8).", metavar="FILE", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of each run.", min=2)] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check that the text does not depend on how it is decoded.

    Every prompt is decoded without drafts, then with several draft lengths,
    another number of threads, and small prompt chunks, both greedily and
    sampled. All logits must be bitwise equal. Draft lengths are then timed. The
    exit code is 1 if anything differs, which would be a defect.

    \b
    Examples:
      paceline verify tiny-python
      paceline verify google/gemma-4-E2B-it --quant q4 --max-tokens 32
      paceline verify ./my-model --drafter ./my-drafter --prompts mine.txt --json
    """
    own = _read_prompts(prompts) if prompts else None
    engine = opt.load(model, drafter=drafter, quant=quant, kv=kv, threads=threads, device=device)
    from paceline.bench.audit import PROMPTS, audit, measure_speeds

    texts = own or PROMPTS
    with progress_bar("runs") as progress:
        found = audit(engine, texts, max_tokens, progress)
        speeds = measure_speeds(engine, texts, max_tokens, progress)
    about = {
        "model": model,
        "quant": engine.backend.info.quant,
        "kv": engine.backend.info.kv,
        "threads": engine.backend.threads,
        "isa": engine.backend.info.device,
        "version": __version__,
        "prompts": len(texts),
        "max_tokens": max_tokens,
    }
    if as_json:
        print(json.dumps(about | _report(found, speeds), ensure_ascii=False))
    else:
        _print(engine, about, found, speeds)
    if not found.identical:
        raise typer.Exit(1)


def _read_prompts(path: Path) -> tuple[str, ...]:
    """The non-blank lines of a file.

    Raises:
        PacelineError: it cannot be read, is not UTF-8, or has no such line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingsError(
            f"{path}: cannot be read ({error.strerror}); --prompts takes a text file with one prompt per line"
        ) from error
    text = opt.decode_text(data, path).removeprefix("\ufeff")
    lines = tuple(line for line in text.replace("\r\n", "\n").split("\n") if line.strip())
    if not lines:
        raise SettingsError(f"{path}: has no prompts; write one per line")
    return lines


def _report(found: Audit, speeds: Speeds | None) -> dict[str, Any]:
    return {
        "identical": found.identical,
        "cases": len(found.runs),
        "different_cases": len(found.different),
        "rows": found.rows,
        "first_difference": _difference(found.different[0]) if found.different else None,
        "acceptance_by_depth": list(found.acceptance_by_depth),
        "acceptance_by_proposer": {
            name: {"drafted": drafted, "accepted": accepted}
            for name, (drafted, accepted) in found.acceptance_by_proposer.items()
        },
        "tokens_per_second": {str(n): speed for n, speed in speeds.tokens_per_second.items()} if speeds else None,
        "best_draft_tokens": speeds.best_fixed if speeds else None,
        "controller_regret_percent": speeds.regret_percent if speeds else None,
    }


def _difference(run: Run) -> dict[str, Any]:
    from paceline.bench.audit import finite

    def shown(top: Top) -> list[dict[str, Any]]:
        return [{"token": token, "logit": finite(logit)} for token, logit in top]

    where = run.difference
    assert where is not None
    return {
        "prompt": run.prompt,
        "sampling": run.sampling,
        "case": str(run.case),
        "position": where.position,
        "expected_token": where.expected_token,
        "found_token": where.found_token,
        "expected_top": shown(where.expected_top),
        "found_top": shown(where.found_top),
        "largest_difference": finite(where.largest),
        "largest_difference_at": where.largest_at,
    }


def _print(engine: Engine, about: dict[str, Any], found: Audit, speeds: Speeds | None) -> None:
    from rich.console import Console

    from paceline.bench.audit import SAMPLINGS, cases_of

    out = Console(highlight=False, markup=False, soft_wrap=True)
    what = "{model}, {quant}, threads: {threads}, {isa}; prompts: {prompts}, tokens: up to {max_tokens} each"
    out.print(what.format_map(about))
    if not engine.backend.info.has_drafter:
        out.print("There is no drafter: only threads and prompt chunks are compared.")
    out.print(f"Plain decoding against {'; '.join(map(str, cases_of(engine)))}; each {', '.join(SAMPLINGS)}.\n")
    if found.identical:
        out.print(f"IDENTICAL: {len(found.runs)} runs, {found.rows} rows of logits, all bitwise equal.")
    else:
        _print_difference(out, found)
    if found.acceptance_by_depth:
        shares = "  ".join(f"{depth}: {share:.0%}" for depth, share in enumerate(found.acceptance_by_depth, start=1))
        out.print(f"\nAcceptance rate by depth (share of rounds):  {shares}")
    seen = found.acceptance_by_proposer.items()
    parts = [f"{name} {drafted}, {accepted / drafted:.0%}" for name, (drafted, accepted) in seen if drafted]
    if parts:
        out.print(f"Tokens drafted where as many are as pay, and accepted of them:  {'; '.join(parts)}")
    if speeds:
        _print_speeds(out, speeds)
    elif engine.backend.info.has_drafter:
        out.print("\nAll texts ended at the first token, so there is no speed to measure; try other prompts.")


def _print_difference(out: Console, found: Audit) -> None:
    from paceline.bench.audit import shortened

    run = found.different[0]
    where = run.difference
    assert where is not None
    out.print(f"DIFFERENT: {len(found.different)} of {len(found.runs)} runs differ from plain decoding. This is a")
    out.print("defect of paceline; please report it with these lines. The first difference:\n")
    out.print(f"  prompt    {shortened(run.prompt)}")
    out.print(f"  sampling  {run.sampling}")
    out.print(f"  run       {run.case}")
    out.print(f"  position  {where.position} of the prompt and the text")
    ends = [("ended" if token is None else str(token)) for token in (where.expected_token, where.found_token)]
    out.print(f"  token     {ends[0]} in plain decoding, {ends[1]} in this run")
    _print_rows(out, where)


def _print_rows(out: Console, where: Difference) -> None:
    """The rows that differ, with enough digits to distinguish float32 values."""
    from rich.table import Table

    if where.largest is None:
        out.print("  logits    equal in all rows")
        return
    out.print(
        f"  logits    differ by {where.largest:.3g} at most, those of token {where.largest_at}; the highest are\n"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for title in ("", "plain", "logit", "this run", "logit"):
        table.add_column(title, justify="right")
    for (token, logit), (other, other_logit) in zip(where.expected_top, where.found_top, strict=True):
        table.add_row("", str(token), f"{logit:.9g}", str(other), f"{other_logit:.9g}")
    out.print(table)


def _print_speeds(out: Console, speeds: Speeds) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for title in ("draft length", "tokens/s", "of plain", ""):
        table.add_column(title, justify="right")
    plain = speeds.tokens_per_second[0]
    for depth, speed in speeds.tokens_per_second.items():
        mark = "best fixed" if depth == speeds.best_fixed else ""
        table.add_row(str(depth), f"{speed:.1f}", f"{speed / plain:.2f}", mark)
    out.print()
    out.print(table)
    regret = speeds.regret_percent
    out.print(
        f"\nauto is {abs(regret):.1f} % {'slower' if regret > 0 else 'faster'} than the best fixed draft length "
        "(medians of alternating runs, greedy and sampled)."
    )
