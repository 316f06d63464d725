"""The gather format as Python sees it: its sizes, weights of several tiles, products on a GPU."""

import numpy as np
import pytest
import torch
from formats import DTYPES, each, plan_names, read

import flash_llm
from flash_llm import Gather, testing

CONFIGS = [name for name in plan_names("gather", "cuda") if name != "dense"]
EVERY_CONFIG = pytest.mark.parametrize(
    "config",
    [
        pytest.param(name, marks=[pytest.mark.gpu, pytest.mark.runs_here("gather", "cuda", name)])
        for name in CONFIGS
    ],
)


@pytest.mark.parametrize("shape", [(20, 8200), (1030, 40)])
def test_weights_of_several_tiles_read_as_packed(shape, device):
    dense = testing.random_sparse(*shape, 0.98, seed=1, device=device)
    packed = Gather.from_dense(dense)
    packed.validate()
    assert torch.equal(packed.to_dense(), dense)
    assert np.array_equal(read(packed), dense.cpu().view(torch.int16).numpy().view(np.uint16))


def test_stats_counts_bytes_of_tiles():
    dense = torch.zeros(1030, 16, dtype=torch.float16)
    dense[:2] = 1  # one slice of 4 steps: 1024 bytes of rows, 128 of quads, 64 and 384 of the slice
    stats = Gather.from_dense(dense).stats()
    assert (stats.nnz, stats.exact_bytes, stats.tile_bytes_max) == (32, 96, 1600)
    assert stats.packed_bytes == 64 + 4 * 4 + 1600
    assert Gather.from_dense(torch.zeros(0, 5, dtype=torch.float16)).stats().tile_bytes_max == 0


def several_parts(dtype, k=17001, m=530):
    """A weight of three parts, the last of 617 columns, and of two tile rows."""
    weight = testing.small_integers(m, k, sparsity=0.9, dtype=dtype, device="cuda")
    weight[100:140] = 0
    weight[512:, 8192:16384] = 0  # a tile without bytes
    return weight


@EVERY_CONFIG
@each("dtype", DTYPES)
def test_sums_of_several_parts_are_exact(config, dtype):
    weight = several_parts(dtype)
    packed = Gather.from_dense(weight)
    x = testing.small_integers(19, weight.shape[1], dtype=dtype, device="cuda", seed=1)
    bias = testing.small_integers(weight.shape[0], dtype=dtype, device="cuda", seed=2)
    expected = testing.spmm_reference(x, weight, bias, "relu").float().to(dtype)
    for n in (1, 2, 3, 8, 9, 19):
        for ctas in (0, 1, 3, 5, 132):
            y = flash_llm.spmm(x[:n], packed, bias, activation="relu", config=config, ctas=ctas)
            assert torch.equal(y, expected[:n]), (n, ctas)


@EVERY_CONFIG
@each("dtype", DTYPES)
def test_inf_spreads_from_each_part(config, dtype):
    weight = several_parts(dtype)
    x = testing.small_integers(9, weight.shape[1], dtype=dtype, device="cuda", seed=1)
    x[0, 3], x[2, 9000], x[5, 16999], x[8, 17000] = float("inf"), -torch.inf, torch.inf, torch.nan
    weight[:, 3] = 1  # every row stores it, so no zero meets this Inf
    y = flash_llm.spmm(x, Gather.from_dense(weight), config=config)
    expected = torch.nn.functional.linear(x.float(), weight.float())
    assert torch.equal(y.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(y[finite], expected[finite].to(dtype))
    assert not y[0].isnan().any() and y[2].isnan().any()


@pytest.mark.gpu
@each("rows", ["equal", "one full", "falling"])
def test_rows_of_very_different_lengths(rows):
    """CTAs take slices of equal bytes, so some have many of them."""
    m, k = 3000, 1000
    keep = {
        "equal": torch.full((m,), 0.1),
        "one full": torch.zeros(m).index_fill_(0, torch.tensor([1700]), 1.0),
        "falling": torch.linspace(1, 0, m) ** 8,
    }[rows]
    mask = torch.rand(m, k) < keep[:, None]
    weight = testing.small_integers(m, k, sparsity=0.0, device="cuda") * mask.cuda()
    x = testing.small_integers(8, k, device="cuda", seed=1)
    packed = Gather.from_dense(weight)
    for ctas in (0, 2):
        y = flash_llm.spmm(x, packed, ctas=ctas)
        assert torch.equal(y, testing.spmm_reference(x, weight).float().half()), ctas
