"""``flash-llm bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flash_llm.bench import TOKENS, bench_checkpoint
from flash_llm.cli import options
from flash_llm.demo import pick_device


def bench(
    folder: Annotated[Path, typer.Argument(help="Folder of safetensors, packed or dense.")],
    tokens: Annotated[
        list[int] | None,
        typer.Option("--n", help=f"Tokens at once; by default {', '.join(map(str, TOKENS))}."),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Prune dense weights to this fraction of zeros."),
    ] = None,
    format: options.Format = "auto",
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Time each weight shape of a model, sparse against dense, and show the crossovers."""
    report = bench_checkpoint(
        folder,
        tokens=tokens or TOKENS,
        sparsity=sparsity,
        format=format,
        device=pick_device(device)[0],
        progress=options.progress(),
    )
    options.show(report, as_json)
