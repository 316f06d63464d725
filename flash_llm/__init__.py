"""Sparse language models whose weights are loaded as sparse and computed as dense (Flash-LLM).

Pack a pruned ``nn.Linear`` into a :class:`SparseLinear`, or multiply directly with :func:`spmm`.
Importing this package prints nothing, creates no CUDA context and does not fail if the compiled
extension is missing: the first operator that needs it raises an error that says what to do.
"""

from __future__ import annotations

from typing import Any

from flash_llm import interrupts

with interrupts.deferred():
    import torch  # noqa: F401 (the one import that takes seconds)

from flash_llm import _extension
from flash_llm.evaluate import perplexity
from flash_llm.formats.bitmap import Bitmap
from flash_llm.formats.gather import Gather
from flash_llm.formats.quantized_bitmap import QuantizedBitmap
from flash_llm.formats.row_bitmap import RowBitmap
from flash_llm.formats.tiled_csl import TiledCSL
from flash_llm.integrations import hf
from flash_llm.integrations.hf import from_pretrained
from flash_llm.io.checkpoint import load, save
from flash_llm.io.convert import convert_checkpoint, inspect_checkpoint
from flash_llm.io.verify import verify_checkpoint
from flash_llm.linear import SparseLinear
from flash_llm.ops import PackedWeight, explain_format, pack, prune_pack, spmm, unpack
from flash_llm.prune.calibrate import prune_
from flash_llm.prune.checkpoint import prune_checkpoint
from flash_llm.prune.recover import RecoveryReport, recover_
from flash_llm.prune.report import PruneReport
from flash_llm.prune.sensitivity import SensitivityReport, sensitivity
from flash_llm.sparsify import SparsifyReport, sparsify_

__version__ = "0.1.0"

hf.register_when_imported()

__all__ = [
    "Bitmap",
    "Gather",
    "PackedWeight",
    "PruneReport",
    "QuantizedBitmap",
    "RecoveryReport",
    "RowBitmap",
    "SensitivityReport",
    "SparseLinear",
    "SparsifyReport",
    "TiledCSL",
    "__version__",
    "build_info",
    "configs",
    "convert_checkpoint",
    "explain_format",
    "explain_plan",
    "from_pretrained",
    "inspect_checkpoint",
    "load",
    "pack",
    "perplexity",
    "prune_",
    "prune_checkpoint",
    "prune_pack",
    "recover_",
    "save",
    "sensitivity",
    "sparsify_",
    "spmm",
    "unpack",
    "verify_checkpoint",
]


def build_info() -> dict[str, Any]:
    """Return what the extension was built with.

    Returns:
        ``cuda`` (whether there is a CUDA part), ``cuda_version`` (of the nvcc that built it, or
        None), ``cuda_archs``, ``torch`` (version built against), ``compiler``, and ``reason`` (why
        there is no CUDA part, "" when there is one).

    Raises:
        RuntimeError: the extension is missing.
    """
    info: dict[str, Any] = _extension.require().build_info()
    return info


def configs() -> list[dict[str, Any]]:
    """Return the built configurations of the CUDA kernels.

    Returns:
        For each: ``name``, ``format`` (of the weights that it multiplies), ``tile_n`` (tokens per
        CTA), ``ctas_per_sm`` (as many as the registers allow), ``smem_bytes`` (least shared memory
        per CTA), and the fields of that format's kernel: ``warps_per_tile`` and ``packed_x``
        (whether X is reordered first), or ``x_stages`` (stages of X in shared memory).

    Raises:
        RuntimeError: the extension is missing.
    """
    rows: list[dict[str, Any]] = _extension.require().configs()
    return rows


def explain_plan(
    m: int,
    n: int,
    k: int,
    nnz: int,
    value_type: str = "float16",
    *,
    format: str = "auto",
    compute_capability: int = 0,
    num_sms: int = 0,
    smem_per_sm_bytes: int = 0,
    config: str = "auto",
    ctas: int = 0,
    x_quantization: str | None = None,
) -> str:
    """Say which kernel :func:`spmm` would choose, and why; needs no GPU.

    Args:
        m: out_features.
        n: tokens.
        k: in_features.
        nnz: nonzeros of the weight.
        value_type: ``"float16"`` or ``"bfloat16"``; of quantised values with their name before it,
            such as ``"int8_float16"`` or ``"fp8_e4m3_bfloat16"``.
        format: name of the packed format; ``"auto"`` as :func:`pack` would choose.
        compute_capability: 10 * major + minor of the GPU, 90 for an H100; 0 means the CPU.
        num_sms: number of multiprocessors, 132 for an H100 SXM.
        smem_per_sm_bytes: shared memory of one multiprocessor, 233472 for an H100.
        config: ``"auto"``, or the kernel to force.
        ctas: number of CTAs to force; 0 lets the plan choose it.
        x_quantization: as :func:`spmm` takes it.

    Returns:
        One line of text.

    Raises:
        ValueError: a size does not fit 31 bits, ``format`` is unknown or has no kernel
            ``config`` on this device, ``ctas`` lies outside [0, 65535], or ``x_quantization`` is
            unknown or does not allow a forced kernel.
        TypeError: ``value_type`` is unknown, or the format does not hold such values.
        NotImplementedError: the architecture is older than sm_80.
        RuntimeError: the extension is missing.
    """
    text: str = _extension.require().explain_plan(
        m,
        n,
        k,
        nnz,
        value_type,
        format,
        compute_capability,
        num_sms,
        smem_per_sm_bytes,
        config,
        ctas,
        "none" if x_quantization is None else x_quantization,
    )
    return text
