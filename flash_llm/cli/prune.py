"""``flash-llm prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flash_llm.cli import options
from flash_llm.demo import pick_device
from flash_llm.io.convert import parse_dtype
from flash_llm.ops import STORED_VALUES
from flash_llm.prune.checkpoint import parse_allocation, plan_pruning, prune_checkpoint
from flash_llm.quantize import GRIDS
from flash_llm.select import DEFAULT_IGNORE, DEFAULT_TARGETS


def prune(
    source: Annotated[
        Path, typer.Argument(help="Folder of a dense model of transformers, as safetensors.")
    ],
    target: options.Target,
    method: options.Method = "wanda",
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of zeros in [0, 1]; optional for N:M.")
    ] = None,
    scope: Annotated[str, typer.Option(help="row, layer, N:M or (magnitude) global.")] = "row",
    allocation: Annotated[
        str,
        typer.Option(
            help="uniform, owl, sensitivity, or a .json file with an object from patterns to "
            "sparsities."
        ),
    ] = "uniform",
    calibration: Annotated[
        Path | None,
        typer.Option(help='A .txt file, or .jsonl with the key "text"; magnitude needs none.'),
    ] = None,
    nsamples: Annotated[
        int | None, typer.Option(min=1, help="Calibration samples; all by default.")
    ] = None,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens of each sample.")] = 2048,
    seed: Annotated[
        int | None,
        typer.Option(help="Draw the samples at random; by default they are spread over the file."),
    ] = None,
    targets: options.Targets = None,
    ignore: options.Ignore = None,
    pack: Annotated[
        bool, typer.Option(help="Save packed weights, or dense weights with zeros.")
    ] = True,
    format: options.Format = "auto",
    values: Annotated[
        str,
        typer.Option(
            help="Round the weights that stay: 16-bit does not; "
            f"{', '.join(STORED_VALUES[1:])} are stored as such, "
            f"{', '.join(name for name in GRIDS if name not in STORED_VALUES)} in 16 bits."
        ),
    ] = "16-bit",
    expected_tokens: options.ExpectedTokens = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
    resume: Annotated[
        bool, typer.Option(help="Continue from TARGET.partial if it exists, or start over.")
    ] = True,
    dry_run: options.DryRun = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    layers: options.Layers = False,
) -> None:
    """Prune a model and save it, packed; repeat the command to continue after Ctrl-C."""
    chosen: dict[str, Any] = {
        "method": method,
        "sparsity": sparsity,
        "scope": scope,
        "allocation": parse_allocation(allocation),
        "calibration": calibration,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "seed": seed,
        "targets": targets or DEFAULT_TARGETS,
        "ignore": DEFAULT_IGNORE if ignore is None else ignore,
        "pack": pack,
        "format": format,
        "values": None if values == "16-bit" else values,
        "expected_tokens": expected_tokens,
        "dtype": parse_dtype(dtype),
        "trust_remote_code": trust_remote_code,
    }
    where = pick_device(device)[0]
    if dry_run:
        options.show(plan_pruning(source, target, **chosen), as_json, layers)
        return
    with options.resumable(target):
        report = prune_checkpoint(
            source,
            target,
            device=where,
            resume=resume,
            progress=options.transformers_progress(),
            **chosen,
        )
    options.show(report, as_json, layers)
