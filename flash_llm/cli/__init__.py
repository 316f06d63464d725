"""The command ``flash-llm``: one module per command, which parses and calls the package."""

from __future__ import annotations

import sys

from flash_llm import interrupts


def main() -> None:
    """Entry point of the script ``flash-llm``."""
    interrupts.exit_at_once()
    try:
        from flash_llm.cli.app import build_app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit(
            "flash-llm: the command line needs typer, which is not installed; run: "
            "pip install 'flash-llm[demo]'"
        )
    build_app()()
