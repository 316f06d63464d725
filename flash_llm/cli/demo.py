"""``flash-llm demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flash_llm import demo as demo_module
from flash_llm.cli import options


def demo(
    method: options.Method = demo_module.METHOD,
    sparsity: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Fraction of zeros in every row.")
    ] = demo_module.SPARSITY,
    windows: Annotated[
        int, typer.Option(min=1, help="Held-out windows of 512 tokens for the perplexity.")
    ] = demo_module.WINDOWS,
    calibration_samples: Annotated[
        int, typer.Option(min=1, help="Calibration samples of 512 tokens.")
    ] = demo_module.CALIBRATION_SAMPLES,
    device: options.Device = "auto",
    question: Annotated[str, typer.Option(help="Question for both models.")] = demo_module.QUESTION,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="OUT", help="Also write all numbers to this file."),
    ] = None,
) -> None:
    """Prune and pack SmolLM2-135M-Instruct, and show what this costs and saves."""
    agrees = demo_module.main(
        method=method,
        sparsity=sparsity,
        windows=windows,
        calibration_samples=calibration_samples,
        device=device,
        question=question,
        json_path=json_path,
    )
    if not agrees:
        raise typer.Exit(1)
