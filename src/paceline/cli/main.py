"""Assembles the verbs, and turns every error a user can cause into one line on stderr and exit code 2."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from paceline import __version__
from paceline.cli.bench import bench
from paceline.cli.chat import chat
from paceline.cli.convert import convert
from paceline.cli.demo import demo
from paceline.cli.generate import generate
from paceline.cli.inspect import inspect
from paceline.cli.serve import serve
from paceline.cli.verify import verify
from paceline.errors import PacelineError

USER_ERROR = 2

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
for verb in (generate, serve, chat, demo, inspect, convert, verify):
    app.command()(verb)
app.add_typer(bench, name="bench")


def main() -> NoReturn:
    """The entry point."""
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's own, and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        code = app(arguments, prog_name="paceline", standalone_mode=False)
    except PacelineError as error:
        return _fail(str(error))
    except MemoryError:
        return _fail("not enough memory; use --quant q4 or a smaller model")
    except OSError as error:  # stdin or stdout: everything else has its own error
        return _fail(f"cannot read or write ({error.strerror}); check where input and output go")
    except typer.TyperException as error:  # a wrong option or argument
        if not error.format_message():  # a verb without its own: the help has been shown
            return USER_ERROR
        return _fail(f"{error.format_message()} (see paceline --help)")
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    print(f"paceline: error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"paceline {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def paceline(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Gemma 4 with its MTP drafters, on an ordinary processor.

    A small drafter guesses the next tokens and the model checks them all in one
    pass: the text is the model's own, and it comes faster.

    \b
    Start with:
      paceline demo                             (offline, with the bundled pair)
      paceline inspect google/gemma-4-E2B-it    (what a model needs)
      paceline generate -m google/gemma-4-E2B-it "Why is the sky blue?"
    """
    if context.invoked_subcommand is None:
        print(context.get_help())
