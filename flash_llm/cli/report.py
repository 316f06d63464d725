"""``flash-llm report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flash_llm.cli import options
from flash_llm.io.report import report_checkpoint


def report(
    folder: Annotated[Path, typer.Argument(help="Folder created by flash-llm prune or convert.")],
    as_json: options.AsJson = False,
    layers: options.Layers = False,
) -> None:
    """Show how a model was pruned, and its sizes, formats and sparsities."""
    found = report_checkpoint(folder)
    options.show(found, as_json, layers)
