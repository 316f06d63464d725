"""Dense FP8 as PyTorch does it, for comparison: e4m3 operands, one scale for each tensor."""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
# Largest relative error (Frobenius norms) of a correct product: two operands of 4 significant bits
# each give about 0.04 on random values.
MAX_REL_ERR = 0.1


def suits(m: int, k: int, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability multiplies by an FP8 weight ``[m, k]``.

    torch requires multiples of 16 for ``m`` and ``k``; N can be any number.
    """
    return capability >= (8, 9) and m % 16 == 0 and k % 16 == 0


def quantise(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 values of the same shape and the float32 scalar to multiply them by."""
    scale = (dense.abs().amax().float() / torch.finfo(E4M3).max).clamp(min=1e-12)
    return (dense.float() / scale).to(E4M3), scale


def linear(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x w^T``.

    Args:
        x: ``[N, K]`` e4m3.
        x_scale: its scale.
        w: ``[M, K]`` e4m3.
        w_scale: its scale.
        dtype: float16 or bfloat16.

    Returns:
        ``[N, M]`` of ``dtype``, with fast accumulation, as in inference.

    Raises:
        RuntimeError: cuBLAS has no kernel for these sizes.
    """
    return torch._scaled_mm(
        x, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=dtype, use_fast_accum=True
    )
