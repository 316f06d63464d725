"""The typer application: its commands, and the exit codes of errors and of Ctrl-C."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

import flash_llm
from flash_llm import interrupts
from flash_llm.cli import (
    bench,
    convert,
    demo,
    doctor,
    eval,
    inspect,
    prune,
    report,
    verify,
)
from flash_llm.cli.options import in_words_of_the_shell

EXIT_CODES = "Exit codes: 0 done, 1 error or failed check, 2 wrong usage, 130 interrupted."

COMMANDS: dict[str, Callable[..., None]] = {
    "prune": prune.prune,
    "convert": convert.convert,
    "inspect": inspect.inspect,
    "verify": verify.verify,
    "bench": bench.bench,
    "eval": eval.evaluate,
    "report": report.report,
    "doctor": doctor.doctor,
    "demo": demo.demo,
}


def build_app() -> typer.Typer:
    """Build the typer application with its commands."""
    app = typer.Typer(
        name="flash-llm",
        help="Language models with sparse weights, loaded as sparse and computed as dense.",
        epilog=EXIT_CODES,
        no_args_is_help=True,
        add_completion=False,
    )
    app.callback()(_program)
    for name, command in COMMANDS.items():
        app.command(name, epilog=EXIT_CODES)(_with_exit_codes(name, command))
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flash-llm {flash_llm.__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options of no command."""


def _with_exit_codes(name: str, command: Callable[..., None]) -> Callable[..., None]:
    """Turn an expected error into one line and exit code 1, and Ctrl-C into exit code 130."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            with interrupts.raised_until_caught():
                command(*args, **options)
        except BrokenPipeError:  # by `| head`; typer exits without a message
            raise
        except (ImportError, OSError, RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, typer.Exit):  # which derives from RuntimeError
                raise
            message = in_words_of_the_shell(str(error), command)
            typer.echo(f"flash-llm {name}: {message}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interruption:
            typer.echo(f"flash-llm {name}: interrupted{interruption}", err=True)
            raise typer.Exit(interrupts.EXIT_CODE) from None

    return run
