"""``flash-llm convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flash_llm.cli import options
from flash_llm.io.convert import CONVERT_IGNORE, EVERY_LAYER, convert_checkpoint, parse_dtype


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of safetensors, pruned.")],
    target: options.Target,
    targets: options.Targets = None,
    ignore: options.Ignore = None,
    format: options.Format = "auto",
    values: options.ValuesOrStored = None,
    expected_tokens: options.ExpectedTokens = None,
    x_quantization: options.XQuantization = None,
    dtype: options.Dtype = None,
    workers: Annotated[int, typer.Option(min=1, help="Files to convert at once.")] = 1,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    layers: options.Layers = False,
) -> None:
    """Pack the pruned weights of a checkpoint; repeat the command to continue after Ctrl-C."""
    with options.resumable(target):
        report = convert_checkpoint(
            source,
            target,
            targets=targets or EVERY_LAYER,
            ignore=CONVERT_IGNORE if ignore is None else ignore,
            format=format,
            values=values,
            expected_tokens=expected_tokens,
            x_quantization=x_quantization,
            dtype=parse_dtype(dtype),
            workers=workers,
            dry_run=dry_run,
            progress=options.progress(),
        )
    options.show(report, as_json, layers, convert)
    if dry_run and not as_json:
        typer.echo("Nothing was written: this is what the command would do.")
