"""The command line: all commands, and one-line messages with exit code 2 for errors that users can cause."""

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
from paceline.cli.eval import evaluate
from paceline.cli.generate import generate
from paceline.cli.inspect import inspect
from paceline.cli.serve import serve
from paceline.cli.train import train
from paceline.cli.verify import verify
from paceline.errors import PacelineError

USER_ERROR = 2

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
for command in (generate, serve, chat, demo, inspect, convert, train, verify):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(bench, name="bench")


def main() -> NoReturn:
    """The entry point."""
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default `sys.argv`, and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show a character
    try:
        code = app(arguments, prog_name="paceline", standalone_mode=False)
    except PacelineError as error:
        return _fail(str(error))
    except MemoryError:
        return _fail("not enough memory; use --quant q4 or a smaller model")
    except OSError as error:  # stdin or stdout; other files have their own errors
        return _fail(f"cannot read or write ({error.strerror}); check where input and output go")
    except typer.TyperException as error:  # a wrong option or argument
        if not error.format_message():  # no subcommand: the help has been shown
            return USER_ERROR
        return _fail(f"{error.format_message()} (see paceline --help)")
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    print(f"paceline: error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


def _print_version(requested: bool) -> None:
    if requested:
        print(f"paceline {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def paceline(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Gemma 4 with its MTP drafters, on ordinary processors.

    A small draft model proposes the next tokens, and the target model verifies
    them all in one forward pass: the same text, faster.

    \b
    Start with:
      paceline demo                             (with a pair that comes with paceline)
      paceline inspect google/gemma-4-E2B-it    (memory needs of a model)
      paceline generate -m google/gemma-4-E2B-it "Why is the sky blue?"
    """
    if context.invoked_subcommand is None:
        print(context.get_help())
