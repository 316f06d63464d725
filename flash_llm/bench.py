"""Time the linear layers of a checkpoint, sparse against dense, on this machine.

Every distinct weight shape of the folder is timed once, with one of its own weights, by the method
of :mod:`flash_llm.timing`: on CUDA against cuBLAS in graphs, on the CPU against ``F.linear`` in the
same dtype. ``benchmarks/`` measures more cases, on random weights.
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
from flash_llm.report_base import Report
from flash_llm.table import aligned, natural, shape_text, stored_text
from flash_llm.timing import copies_to_rotate, time_cpu, time_cuda

TOKENS = (1, 8, 16, 32, 64, 128, 256)
"""Default numbers of tokens: from decoding one sequence to a short prompt."""

# With more tokens it hardly matters whether the weight is in a cache, so two copies are enough.
_MANY_TOKENS = 16

# Above this ratio the dense weight, which is needed for comparison, is too large for such a file.
_MOST_TIMES_SMALLER = 1000


@dataclasses.dataclass(frozen=True)
class ProductTiming:
    """Times of one product ``y[N, M] = x[N, K] . w^T``, sparse and dense.

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
    """Times of all products of one weight shape.

    Attributes:
        layer: name of the layer whose weight was timed.
        num_layers: layers of this shape in the checkpoint.
        shape: ``(M, K)`` = (out_features, in_features).
        sparsity: fraction of zeros in [0, 1] of the weight.
        stored_format: name of the packed format in the folder, or ``"dense"``.
        format: name of the packed format that was timed.
        values: what it stores, one of :data:`flash_llm.ops.STORED_VALUES`.
        dense_bytes: bytes of the dense weight.
        packed_bytes: bytes of the packed weight.
        products: by increasing number of tokens.
    """

    layer: str
    num_layers: int
    shape: tuple[int, int]
    sparsity: float
    stored_format: str
    format: str
    values: str
    dense_bytes: int
    packed_bytes: int
    products: tuple[ProductTiming, ...]

    IN_JSON: ClassVar[tuple[str, ...]] = ("dense_wins_from",)

    @property
    def dense_wins_from(self) -> int | None:
        """The smallest timed N from which dense is always faster; None if never.

        The crossover lies between this N and the timed N before it.
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
        device: ``"cpu"``, or the name of the GPU.
        dtype: of weights and tokens.
        threads: number of torch's threads, which matters on the CPU.
        shapes: largest first.
    """

    device: str
    dtype: str
    threads: int
    shapes: tuple[ShapeTiming, ...]

    def __str__(self) -> str:
        """One line for each shape and N, then the crossover of each shape."""
        titles = ("MxK", "layers", "sparsity", "format", "N", "sparse us", "dense us", "speed-up")
        table = [titles]
        for shape in self.shapes:
            for product in shape.products:
                table.append(
                    (
                        shape_text(shape.shape),
                        str(shape.num_layers),
                        f"{shape.sparsity:.4f}",
                        stored_text(shape.format, shape.values),
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
        tokens: the numbers N of tokens to time.
        sparsity: prune dense weights to this fraction of zeros in [0, 1] of each row, by magnitude.
            None keeps the weights as they are.
        format: ``"auto"`` (the fastest on the device), or a format's name.
        device: where to run.
        progress: True for a tqdm bar over the shapes, or a callable such as
            ``rich.progress.track``.

    Returns:
        The times. float32 weights are cast to bfloat16 for both products; weights that are packed
        in another format are packed again. Those with quantised values keep them; the dense product
        takes what they stand for.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: a file is broken; there is no linear layer; the weights are dense without zeros
            and ``sparsity`` is None, or packed and it is not; ``tokens``, ``sparsity`` or
            ``format`` is wrong.
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
            packed = _packed(view, layers[shape][0], weight, format)
            if packed.sparsity == 0 and packed.values == "16-bit" and sparsity is None:
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
                    values=packed.values,
                    dense_bytes=packed.dense_nbytes,
                    packed_bytes=packed.nbytes,
                    products=_time_products(weight, packed, tokens),
                )
            )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return BenchReport(name, " and ".join(sorted(dtypes)), torch.get_num_threads(), tuple(timed))


def _layers_by_shape(view: DenseView) -> dict[tuple[int, int], list[str]]:
    """Return the packed layers by shape, or else those that a conversion would consider."""
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
    """Return the layer's dense weight, cast to bfloat16 if it cannot be packed as it is."""
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


def _packed(view: DenseView, layer: str, weight: Tensor, format: str) -> PackedWeight:
    """Return the layer's weight in a format, with the values that are stored."""
    if layer not in view.checkpoint.packed:
        return ops.pack(weight, format)
    return ops.repack(view.checkpoint.weight(layer).to(weight.device), format)


def _time_products(
    weight: Tensor, packed: PackedWeight, tokens: Sequence[int]
) -> tuple[ProductTiming, ...]:
    """Time every N, with copies of the weights that together exceed the caches."""
    dense_copies = [weight.clone() for _ in range(copies_to_rotate(weight.nbytes))]
    # Packed one by one: packing requests huge pages, a clone would not have them.
    others = copies_to_rotate(packed.nbytes) - 1
    packed_copies = [packed, *(ops.repack(packed, packed.FORMAT) for _ in range(others))]
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
