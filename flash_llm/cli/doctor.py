"""``flash-llm doctor``."""

from __future__ import annotations

import typer

from flash_llm.cli import options
from flash_llm.doctor import diagnose


def doctor(as_json: options.AsJson = False) -> None:
    """Show what is installed and built, and test every operator; exit code 1 on a failure."""
    diagnosis = diagnose()
    options.show(diagnosis, as_json)
    if not diagnosis.ok:
        raise typer.Exit(1)
