"""``flash-llm verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flash_llm.cli import options
from flash_llm.io.verify import verify_checkpoint


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of safetensors, packed or dense.")],
    reference: Annotated[Path, typer.Option(help="The dense folder that it was made from.")],
    max_error: Annotated[
        float, typer.Option(min=0.0, help="Exit with 1 above this relative error.")
    ] = float("inf"),
    as_json: options.AsJson = False,
    layers: options.Layers = False,
) -> None:
    """Show the difference between every tensor and that of a reference."""
    report = verify_checkpoint(folder, reference)
    options.show(report, as_json, layers)
    if report.max_relative_error > max_error:
        raise typer.Exit(1)
