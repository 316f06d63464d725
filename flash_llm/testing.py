"""Inputs and oracles for tests and benchmarks: random sparse weights, references and tolerances.

There are two oracles. :func:`spmm_reference` computes in float64 from the same rounded inputs, and
:func:`spmm_error_bound` gives the largest error of a correct kernel. Small integers
(:func:`small_integers`) have exact products and sums in float32, so that results can be compared
with ``torch.equal``, which reveals the index, order and split-K errors that tolerances hide.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Half the distance from 1 to the next number: the largest relative error of a correct rounding.
_UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Half the smallest subnormal: the largest absolute error of a correct rounding near zero.
_HALF_SUBNORMAL = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}

PATTERNS = ("uniform", "tiles", "rows", "columns")
"""How :func:`random_sparse` can place the zeros."""


def random_sparse(
    m: int,
    k: int,
    sparsity: float = 0.8,
    *,
    pattern: str = "uniform",
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Return a dense ``[m, k]`` weight with random zeros.

    It is the same on every device, and with every default dtype of torch.

    Args:
        m: rows.
        k: columns.
        sparsity: expected fraction of zeros in [0, 1] (for ``"uniform"``, ``"rows"`` and
            ``"columns"``).
        pattern: ``"uniform"``: each element independently; ``"tiles"``: each 128 x 64 tile is
            empty, full or has its own density; ``"rows"`` and ``"columns"``: some are zero, the
            others dense.
        dtype: float16 or bfloat16.
        device: of the result.
        seed: of the generator.

    Returns:
        Normally distributed values, scaled by ``k ** -0.5``, with +0 elsewhere.

    Raises:
        ValueError: ``pattern`` is unknown.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32)

    if pattern == "uniform":
        keep = uniform(m, k) >= sparsity
    elif pattern == "tiles":
        densities = torch.tensor([0.0, 1.0, 0.01, 0.3, 0.7, 0.99])
        tile_rows, tile_cols = -(-m // 128), -(-k // 64)
        choice = torch.randint(len(densities), (tile_rows, tile_cols), generator=generator)
        density = densities[choice].repeat_interleave(128, 0).repeat_interleave(64, 1)[:m, :k]
        keep = uniform(m, k) < density
    elif pattern == "rows":
        keep = (uniform(m, 1) >= sparsity).expand(m, k)
    elif pattern == "columns":
        keep = (uniform(1, k) >= sparsity).expand(m, k)
    else:
        raise ValueError(f"flash_llm.testing: pattern must be one of {PATTERNS}, got {pattern!r}")
    values = torch.randn(m, k, generator=generator, dtype=torch.float32) * max(k, 1) ** -0.5
    return torch.where(keep, values, 0.0).to(device=device, dtype=dtype)


def small_integers(
    *shape: int,
    sparsity: float = 0.0,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Return integers from -2 to 2, exact in every dtype.

    Sums of up to 2**22 products of two such tensors are exact in float32 in any order, so a kernel
    that accumulates in float32 and rounds once has exactly one correct answer.

    Args:
        shape: of the result.
        sparsity: expected fraction of zeros in [0, 1]; all other elements are nonzero.
        dtype: of the result.
        device: of the result.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-2.0, -1.0, 1.0, 2.0])[torch.randint(4, shape, generator=generator)]
    keep = torch.rand(shape, generator=generator, dtype=torch.float32) >= sparsity
    return torch.where(keep, values, 0.0).to(device=device, dtype=dtype)


def activate(z: Tensor, activation: str | None) -> Tensor:
    """Apply an activation of ``spmm`` with torch's own functions, in the dtype of ``z``.

    Raises:
        ValueError: the activation is unknown.
    """
    if activation is None or activation == "none":
        return z
    if activation == "relu":
        return torch.relu(z)
    if activation == "gelu":
        return torch.nn.functional.gelu(z)
    if activation == "silu":
        return torch.nn.functional.silu(z)
    raise ValueError(f"flash_llm.testing: unknown activation {activation!r}")


def spmm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Compute ``act(x @ weight.T + bias)`` in float64.

    Args:
        x: ``[..., K]``.
        weight: dense ``[M, K]``.
        bias: ``[M]`` or None.
        activation: as in ``spmm``.

    Returns:
        ``[..., M]`` float64.
    """
    z = x.double() @ weight.double().t()
    return activate(z if bias is None else z + bias.double(), activation)


def spmm_error_bound(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    rounds_sum: bool = False,
) -> Tensor:
    """Return the largest error of each element that float32 sums and one rounding can explain.

    With A = |x| @ |weight|.T + |bias| and y the exact result,
    ``bound = (1 + u) * e + u * |y| + s`` where

    * ``e = 1.13 * (K + 2) * 2**-23 * A``: K products and the bias, summed in float32 in any order.
      Rounding to nearest needs 2**-24 each; tensor cores truncate, which needs 2**-23. Products of
      16-bit values are exact. 1.13 bounds the slope of relu, silu and gelu;
    * with an activation, e grows by ``8 * 2**-24 * A`` for its evaluation in float32;
    * on the dense route e grows by ``1.13 * (1 + u) * u * |p|`` for each intermediate result p that
      is rounded: the product before a bias (cuBLAS adds some biases in a second kernel) and the
      sum before an activation;
    * ``u`` is the unit roundoff of the output: 2**-11 for float16, 2**-8 for bfloat16;
    * ``s`` is half the output's smallest subnormal.

    Args:
        x: ``[..., K]`` float16 or bfloat16.
        weight: dense ``[M, K]``.
        bias: ``[M]`` or None.
        activation: as in ``spmm``.
        rounds_sum: whether the result may have come from the dense route.

    Returns:
        ``[..., M]`` float64.
    """
    unit = _UNIT_ROUNDOFF[x.dtype]
    magnitude = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    error = 1.13 * (weight.shape[1] + 2) * 2.0**-23 * magnitude
    if activation is not None and activation != "none":
        error = error + 8 * 2.0**-24 * magnitude
        if rounds_sum:
            error = error + 1.13 * (1 + unit) * unit * spmm_reference(x, weight, bias).abs()
    if bias is not None and rounds_sum:
        error = error + 1.13 * (1 + unit) * unit * spmm_reference(x, weight).abs()
    exact = spmm_reference(x, weight, bias, activation).abs()
    return (1 + unit) * error + unit * exact + _HALF_SUBNORMAL[x.dtype]


def assert_spmm_close(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    rounds_sum: bool = False,
) -> None:
    """Check a result of ``spmm`` against the float64 oracle.

    Args:
        y: result of ``spmm(x, pack(weight), bias, activation=activation)``.
        x: ``[..., K]`` finite.
        weight: dense ``[M, K]`` finite.
        bias: ``[M]`` or None.
        activation: as in ``spmm``.
        rounds_sum: as in :func:`spmm_error_bound`.

    Raises:
        AssertionError: shape or dtype is wrong, or an element is NaN or its error larger than
            :func:`spmm_error_bound`; the message names the worst element.
    """
    expected = spmm_reference(x, weight, bias, activation)
    if y.shape != expected.shape or y.dtype != x.dtype:
        raise AssertionError(
            f"expected {x.dtype} {list(expected.shape)}, got {y.dtype} {list(y.shape)}"
        )
    if y.numel() == 0:
        return
    bound = spmm_error_bound(x, weight, bias, activation, rounds_sum=rounds_sum)
    excess = ((y.double() - expected).abs() / bound).nan_to_num(nan=float("inf"))
    if bool((excess > 1).any()):
        worst = int(excess.argmax())
        where = [int(i) for i in torch.unravel_index(torch.tensor(worst), y.shape)]
        raise AssertionError(
            f"{int((excess > 1).sum())} of {y.numel()} elements are too far off; worst at {where}: "
            f"expected {float(expected.flatten()[worst])}, got {float(y.flatten()[worst])}, "
            f"bound {float(bound.flatten()[worst])}"
        )
