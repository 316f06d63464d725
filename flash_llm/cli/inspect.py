"""``flash-llm inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flash_llm.cli import options
from flash_llm.cli.convert import convert
from flash_llm.io.convert import inspect_checkpoint
from flash_llm.io.report import total_line


def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of safetensors, dense or packed.")],
    format: Annotated[str, typer.Option(help="Format to pack dense weights in.")] = "auto",
    values: options.ValuesOrStored = None,
    as_json: options.AsJson = False,
    layers: options.Layers = False,
) -> None:
    """Show the sparsity of every weight, and its size when packed."""
    report = inspect_checkpoint(folder, format=format, values=values)
    if not as_json:
        typer.echo(total_line(folder))
    options.show(report, as_json, layers, convert)
