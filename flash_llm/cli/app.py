"""All commands together, and what becomes of errors and of Ctrl-C."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer

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
    for name, command in COMMANDS.items():
        app.command(name, epilog=EXIT_CODES)(_with_exit_codes(name, command))
    return app


def _with_exit_codes(name: str, command: Callable[..., None]) -> Callable[..., None]:
    """Make an expected error one line and exit code 1, and Ctrl-C exit code 130."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except BrokenPipeError:  # of `| head`, which has enough; typer exits in silence
            raise
        except (ImportError, OSError, RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, typer.Exit):  # which derives from RuntimeError
                raise
            typer.echo(f"flash-llm {name}: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interruption:
            typer.echo(f"flash-llm {name}: interrupted{interruption}", err=True)
            raise typer.Exit(130) from None

    return run
