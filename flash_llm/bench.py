"""Time the linear layers of a checkpoint, sparse against dense, on the machine at hand.

Every distinct weight shape of the folder is timed once, on one of its own weights, with the method
of :mod:`flash_llm.timing`: on CUDA against cuBLAS in graphs, on the CPU against ``F.linear`` in the
same dtype. ``benchmarks/`` measures more, on random weights.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_llm import ops
from flash_llm.io.checkpoint import checkpoint_files
from flash_llm.io.convert import CONVERT_IGNORE, EVERY_LAYER, choose_layers
from flash_llm.io.dense_view import DenseView
from flash_llm.ops import PackedWeight
from flash_llm.progress import ProgressBar, track
from flash_llm.report import Report
from flash_llm.table import aligned, natural, shape_text
from flash_llm.timing import copies_to_rotate, time_cpu, time_cuda

TOKENS = (1, 8, 16, 32, 64, 128, 256)
"""Default numbers of tokens: from decoding one sequence to a short prompt."""

# It hardly counts where the weight comes from when so many tokens are multiplied by it.
_MANY_TOKENS = 16

# Above this the dense weight, which is made for comparison, is out of proportion to the file.
_MOST_TIMES_SMALLER = 1000


@dataclasses.dataclass(frozen=True)
class ProductTiming:
    """One product ``y[N, M] = x[N, K] . w^T``, both ways.

    Attributes:
        num_tokens: N.
        sparse_us: microseconds of :func:`flash_llm.spmm`.
        dense_us: microseconds of ``F.linear``.
    """

    num_tokens: int
    sparse_us: float
    dense_us: float


@dataclasses.dataclass(frozen=True)
class ShapeTiming:
    """All products of one weight shape.

    Attributes:
        layer: whose weight was taken.
        num_layers: layers of this shape in the checkpoint.
        shape: ``(M, K)`` = (out_features, in_features).
        sparsity: fraction of zeros in [0, 1] of the weight.
        stored_format: name of the packed format in the folder, or ``"dense"``.
        format: name of the packed format that was timed.
        dense_bytes: of the dense weight.
        packed_bytes: of the packed weight.
        products: by number of tokens.
    """

    layer: str
    num_layers: int
    shape: tuple[int, int]
    sparsity: float
    stored_format: str
    format: str
    dense_bytes: int
    packed_bytes: int
    products: tuple[ProductTiming, ...]

    IN_JSON: ClassVar[tuple[str, ...]] = ("dense_wins_from",)

    @property
    def dense_wins_from(self) -> int | None:
        """The smallest timed N from which on dense is the faster one; None if it is not at the end.

        Between this and the timed N before lies the crossover.
        """
        wins = None
        for product in reversed(self.products):
            if product.dense_us >= product.sparse_us:
                break
            wins = product.num_tokens
        return wins


@dataclasses.dataclass(frozen=True)
class BenchReport(Report):
    """Sparse against dense for the shapes of a checkpoint; prints as a table.

    Attributes:
        device: where it was measured.
        dtype: of weights and tokens.
        threads: of torch, which count on the CPU.
        shapes: largest first.
    """

    device: str
    dtype: str
    threads: int
    shapes: tuple[ShapeTiming, ...]

    def __str__(self) -> str:
        """Two tables in one: a line for each shape and N, and after each shape the crossover."""
        titles = ("MxK", "layers", "sparsity", "format", "N", "sparse us", "dense us", "speed-up")
        table = [titles]
        for shape in self.shapes:
            for product in shape.products:
                table.append(
                    (
                        shape_text(shape.shape),
                        str(shape.num_layers),
                        f"{shape.sparsity:.4f}",
                        shape.format,
                        str(product.num_tokens),
                        f"{product.sparse_us:.1f}",
                        f"{product.dense_us:.1f}",
                        f"{product.dense_us / product.sparse_us:.2f}",
                    )
                )
        lines = [*aligned(table), ""]
        for shape in self.shapes:
            wins = shape.dense_wins_from
            line = f"dense wins from N = {wins}" if wins else "packed wins at the largest N"
            if shape.packed_bytes >= shape.dense_bytes:
                ratio = shape.packed_bytes / max(shape.dense_bytes, 1)
                line += f", but packing takes {ratio:.2f}x the bytes, so that it stays dense"
            lines.append(f"{shape_text(shape.shape)}: {line}")
        for stored, timed in dict.fromkeys((s.stored_format, s.format) for s in self.shapes):
            if stored not in ("dense", timed):
                lines.append(f"Stored as {stored}, repacked as {timed} for this device.")
        threads = f", {self.threads} threads" if self.device == "cpu" else ""
        lines.append(f"On {self.device}{threads}, {self.dtype}.")
        return "\n".join(lines)


def bench_checkpoint(
    folder: str | os.PathLike[str],
    *,
    tokens: Sequence[int] = TOKENS,
    sparsity: float | None = None,
    format: str = "auto",
    device: torch.device | str = "cpu",
    progress: bool | ProgressBar = False,
) -> BenchReport:
    """Time each distinct shape of a checkpoint's linear layers, sparse against dense.

    Args:
        folder: safetensors, packed or dense.
        tokens: the numbers N of tokens to multiply at once.
        sparsity: prune dense weights to this fraction of zeros in [0, 1] of each row, by magnitude.
            None takes the zeros that are there.
        format: ``"auto"`` (what is fastest on the device), or a format's name.
        device: where to run.
        progress: True for a tqdm bar over the shapes, or a callable such as
            ``rich.progress.track``.

    Returns:
        The times. float32 weights are cast to bfloat16, for both ways; weights that are packed in
        another format are packed anew.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: a file is broken; there is no linear layer; dense weights without zeros and no
            ``sparsity``, or a ``sparsity`` for packed ones; ``tokens``, ``sparsity`` or ``format``
            is wrong.
        RuntimeError: the compiled extension is missing, or CUDA failed.
    """
    ops.check_format(format)
    if not tokens or min(tokens) < 1:
        raise ValueError(f"flash_llm.bench_checkpoint: tokens must be positive, got {list(tokens)}")
    view = DenseView(checkpoint_files(folder))
    if view.checkpoint.packed and sparsity is not None:
        raise ValueError(
            f"flash_llm.bench_checkpoint: the weights of {folder} are packed; sparsity is for "
            "dense ones"
        )
    layers = _layers_by_shape(view)
    if not layers:
        raise ValueError(f"flash_llm.bench_checkpoint: {folder} has no linear layer")
    device = torch.device(device)
    timed = []
    dtypes = set()
    with torch.inference_mode():
        for shape in track(sorted(layers, reverse=True), "bench", progress):
            weight = _weight(view, layers[shape][0], sparsity, device)
            packed = ops.pack(weight, format)
            if packed.sparsity == 0 and sparsity is None:
                raise ValueError(
                    f"flash_llm.bench_checkpoint: {layers[shape][0]} of {folder} has no zeros; "
                    "pass sparsity= to prune it first"
                )
            dtypes.add(str(weight.dtype).removeprefix("torch."))
            timed.append(
                ShapeTiming(
                    layer=layers[shape][0],
                    num_layers=len(layers[shape]),
                    shape=shape,
                    sparsity=packed.sparsity,
                    stored_format=_stored_format(view, layers[shape][0]),
                    format=packed.FORMAT,
                    dense_bytes=packed.dense_nbytes,
                    packed_bytes=packed.nbytes,
                    products=_time_products(weight, packed, tokens),
                )
            )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return BenchReport(name, " and ".join(sorted(dtypes)), torch.get_num_threads(), tuple(timed))


def _layers_by_shape(view: DenseView) -> dict[tuple[int, int], list[str]]:
    """The layers that are packed or that a conversion would consider."""
    layers: dict[tuple[int, int], list[str]] = {}
    for name in sorted(view.checkpoint.packed, key=natural):
        header, stored = view.checkpoint.packed[name], view.checkpoint.placeholder(name)
        if stored.dense_nbytes > _MOST_TIMES_SMALLER * stored.nbytes:
            raise ValueError(
                f"flash_llm.bench_checkpoint: {name} is packed as [{header.m}, {header.k}] in "
                f"{stored.nbytes} bytes: nearly all zeros, there is nothing to measure"
            )
        layers.setdefault((header.m, header.k), []).append(name)
    if not layers:
        for name in sorted(choose_layers(view, (EVERY_LAYER,), CONVERT_IGNORE), key=natural):
            m, k = view.shapes[name]
            layers.setdefault((m, k), []).append(name)
    return layers


def _stored_format(view: DenseView, layer: str) -> str:
    if layer not in view.checkpoint.packed:
        return "dense"
    return view.checkpoint.placeholder(layer).FORMAT


def _weight(view: DenseView, layer: str, sparsity: float | None, device: torch.device) -> Tensor:
    """The layer's dense weight; as bfloat16 where it is not of 16 bits."""
    weight = view.tensor(f"{layer}.weight")
    if not ops.is_packable(weight.dtype):
        if not weight.is_floating_point():
            raise ValueError(
                f"flash_llm.bench_checkpoint: {layer}.weight must be floating point, got "
                f"{weight.dtype}"
            )
        weight = weight.to(torch.bfloat16)
    weight = weight.to(device)
    return weight if sparsity is None else ops.unpack(ops.prune_pack(weight, sparsity))


def _time_products(
    weight: Tensor, packed: PackedWeight, tokens: Sequence[int]
) -> tuple[ProductTiming, ...]:
    """Time every N, over copies that together exceed the caches."""
    dense_copies = [weight.clone() for _ in range(copies_to_rotate(weight.nbytes))]
    # Packed one by one, because a clone has none of the huge pages that packing asks for.
    others = copies_to_rotate(packed.nbytes) - 1
    packed_copies = [packed, *(ops.pack(weight, packed.FORMAT) for _ in range(others))]
    time_calls = time_cuda if weight.is_cuda else time_cpu
    products = []
    for num_tokens in sorted(set(tokens)):
        x = torch.randn(num_tokens, weight.shape[1], device=weight.device).to(weight.dtype)
        num_copies = None if num_tokens <= _MANY_TOKENS else 2
        contenders: dict[Hashable, Sequence[Callable[[], object]]] = {
            "sparse": [lambda w=w, x=x: ops.spmm(x, w) for w in packed_copies[:num_copies]],  # type: ignore[misc]
            "dense": [lambda w=w, x=x: F.linear(x, w) for w in dense_copies[:num_copies]],  # type: ignore[misc]
        }
        timings = time_calls(contenders)
        products.append(ProductTiming(num_tokens, timings["sparse"].us, timings["dense"].us))
    return tuple(products)
