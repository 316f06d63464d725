"""``flash-llm eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flash_llm.cli import options
from flash_llm.demo import pick_device
from flash_llm.evaluate import evaluate_checkpoints


def evaluate(
    models: Annotated[
        list[Path], typer.Argument(help="Folders of models with tokenizers, dense or packed.")
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 file that the models have not seen.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between window starts; by default the window.")
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Windows to score, from the start; all by default.")
    ] = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Show the perplexity of one or several models on a text."""
    report = evaluate_checkpoints(
        models,
        text,
        window=window,
        stride=stride,
        max_windows=max_windows,
        device=pick_device(device)[0],
        trust_remote_code=trust_remote_code,
        progress=options.transformers_progress(),
    )
    options.show(report, as_json)
