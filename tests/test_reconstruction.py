"""SparseGPT and ADMM against slow, literal oracles in float64."""

import itertools
import math

import pytest
import torch

from flash_llm.prune.admm import admm
from flash_llm.prune.criteria import magnitude_mask, num_pruned, wanda_mask
from flash_llm.prune.reconstruction import damped_problem, relative_error
from flash_llm.prune.sparsegpt import sparsegpt

METHODS = pytest.mark.parametrize("method", [sparsegpt, admm])
SCOPES = pytest.mark.parametrize("scope", ["row", "layer", "2:4", "1:3"])


def problem(rows, cols, seed=0, tokens=None, device="cpu"):
    """A weight and the Hessian of correlated inputs whose channels differ much in size."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = randn(cols, cols) @ randn(cols, tokens or 4 * cols) * randn(cols, 1).exp()
    return randn(rows, cols).to(device), (inputs @ inputs.t()).to(device)


def fraction(scope, sparsity=0.55):
    return None if ":" in scope else sparsity


def objective(weight, pruned, hessian):
    difference = weight - pruned
    return ((difference @ hessian) * difference).sum().item()


def damp(hessian, damping=0.01):
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)


def least_squares(weight, hessian, keep):
    """The best weights on a support, from each row's normal equations."""
    best = torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        target = (hessian @ weight[row])[kept]
        best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], target)
    return best


def obs_column_by_column(weight, hessian, sparsity, scope, block_size):
    """SparseGPT as section 3 of the paper says it, with the inverse computed anew per column."""
    weight, (rows, cols) = weight.clone(), weight.shape
    hessian = damp(hessian)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(cols)]
    choose_every = int(scope.split(":")[1]) if ":" in scope else block_size
    keep = torch.ones(rows, cols, dtype=torch.bool)
    for j in range(cols):
        if j % choose_every == 0:
            places = [(r, c) for r in range(rows) for c in range(j, min(j + choose_every, cols))]
            cost = {(r, c): weight[r, c] ** 2 / inverses[c][0, 0] for r, c in places}
            end = min(j + choose_every, cols)
            if scope == "layer":
                groups = [places]
                drop = num_pruned(sparsity, rows * end) - num_pruned(sparsity, rows * j)
            else:
                groups = [[place for place in places if place[0] == r] for r in range(rows)]
                if scope == "row":
                    drop = num_pruned(sparsity, end) - num_pruned(sparsity, j)
                else:
                    drop = max(end - j - int(scope.split(":")[0]), 0)
            for group in groups:
                for place in sorted(group, key=cost.get)[:drop]:
                    keep[place] = False
        for r in range(rows):
            if not keep[r, j]:
                weight[r, j:] -= weight[r, j] / inverses[j][0, 0] * inverses[j][0]
    return weight * keep


@pytest.mark.parametrize("block_size", [1, 5, 12, 128])
@pytest.mark.parametrize("shape", [(6, 21), (1, 8), (3, 1), (9, 24)])
@SCOPES
def test_sparsegpt_is_column_by_column_brain_surgery(shape, scope, block_size):
    weight, hessian = problem(*shape)
    size = int(scope[-1]) if ":" in scope else 1
    rounded = max(1, block_size // size) * size
    for sparsity in [None] if ":" in scope else [0.0, 0.3, 0.55, 0.9, 1.0]:
        expected = obs_column_by_column(weight, hessian, sparsity, scope, rounded)
        pruned = sparsegpt(weight, hessian, sparsity, scope, block_size=block_size)
        assert torch.equal(pruned == 0, expected == 0)
        torch.testing.assert_close(pruned, expected, rtol=1e-9, atol=1e-9)


def test_sparsegpt_is_exact_least_squares_where_the_pruned_columns_come_first():
    # A sweep from left to right never goes back: in general it is not the best update for its own
    # mask. It is when all that is pruned is pruned before anything is kept.
    weight, hessian = problem(5, 12)
    weight[:, :6] *= 1e-6
    pruned = sparsegpt(weight, hessian, 0.5)
    assert (pruned[:, :6] == 0).all() and (pruned[:, 6:] != 0).all()
    expected = least_squares(weight, damp(hessian), pruned != 0)
    torch.testing.assert_close(pruned, expected, rtol=1e-9, atol=1e-12)

    weight, hessian = problem(5, 12)
    weight[:, 6:] *= 1e-6
    pruned = sparsegpt(weight, hessian, 0.5)
    assert torch.equal(pruned[:, :6], weight[:, :6])  # too late to make up for anything


@SCOPES
@pytest.mark.parametrize("shape", [(6, 21), (1, 8), (3, 1), (40, 64)])
def test_admm_is_exact_least_squares_on_its_support(shape, scope, device):
    weight, hessian = problem(*shape, device=device)
    pruned = admm(weight, hessian, fraction(scope), scope)
    expected = least_squares(weight, damp(hessian), pruned != 0)
    torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-6)
    # In float32 the weights are known less well than what they do.
    single = admm(weight.float(), hessian.float(), fraction(scope), scope).double()
    best = objective(weight, least_squares(weight, damp(hessian), single != 0), damp(hessian))
    assert objective(weight, single, damp(hessian)) <= best * 1.001 + 1e-9


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(4))
def test_admm_is_within_a_factor_of_two_of_the_best_of_all_masks(sparsity, seed):
    weight, hessian = problem(16, 8, seed)
    damped = damp(hessian)
    best = 0.0
    for row in weight:
        masks = itertools.combinations(range(8), 8 - num_pruned(sparsity, 8))
        kept = torch.stack([torch.zeros(8).index_fill(0, torch.tensor(m), 1.0) for m in masks]) > 0
        rows = row.expand(len(kept), 8)
        difference = rows - least_squares(rows, damped, kept)
        best += ((difference @ damped) * difference).sum(dim=1).min().item()
    found = objective(weight, admm(weight, hessian, sparsity), damped)
    assert best * (1 - 1e-9) <= found <= 2.0 * best


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6, 0.7, 0.8])
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_methods_come_in_the_published_order(scope, sparsity, device):
    weight, hessian = problem(64, 96, device=device)
    norm = hessian.diagonal().sqrt()
    errors = [
        relative_error(weight, pruned, hessian)
        for pruned in (
            admm(weight, hessian, sparsity, scope),
            sparsegpt(weight, hessian, sparsity, scope),
            weight * wanda_mask(weight, norm, sparsity, scope),
            weight * magnitude_mask(weight, sparsity, scope),
        )
    ]
    assert errors == sorted(errors)


@METHODS
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (3, 7), (5, 130)])
def test_counts_are_exact(method, shape, dtype):
    weight, hessian = problem(*shape)
    for sparsity in (0.0, 0.5, 0.62, 1.0):
        pruned = method(weight.to(dtype), hessian.float(), sparsity)
        assert pruned.dtype == dtype and pruned.shape == shape and pruned.is_contiguous()
        assert ((pruned == 0).sum(dim=1) == num_pruned(sparsity, shape[1])).all()
        pruned = method(weight.to(dtype), hessian.float(), sparsity, "layer")
        assert (pruned == 0).sum() == num_pruned(sparsity, weight.numel())
    kept = method(weight.to(dtype), hessian.float(), None, "2:4") != 0
    padded = torch.nn.functional.pad(kept, (0, -shape[1] % 4)).view(-1, 4).sum(dim=1)
    assert (padded <= 2).all()


@METHODS
@SCOPES
def test_the_weight_may_be_strided_and_is_not_changed(method, scope):
    weight, hessian = problem(12, 10)
    strided = torch.full((10, 24), math.nan, dtype=torch.float64)[:, ::2].t()
    strided.copy_(weight)
    pruned = method(strided, hessian, fraction(scope), scope)
    assert torch.equal(strided, weight)
    torch.testing.assert_close(pruned, method(weight, hessian, fraction(scope), scope))


@METHODS
@SCOPES
def test_preserved_zeros_stay_and_count(method, scope):
    weight, hessian = problem(8, 160)
    weight *= magnitude_mask(weight, 0.4)
    weight[0, 40:] = 0.0  # more than any target
    pruned = method(weight, hessian, fraction(scope), scope, preserve_mask=True)
    assert (pruned[weight == 0] == 0).all()
    if scope == "row":
        assert ((pruned[1:] == 0).sum(dim=1) == num_pruned(0.55, 160)).all()
    if ":" in scope:  # otherwise a zero may come to life, where a group has more than enough
        assert (method(weight, hessian, None, scope)[weight == 0] != 0).any()


@METHODS
def test_dead_inputs_lose_their_weights(method):
    weight, hessian = problem(6, 16)
    dead = torch.zeros(16, dtype=torch.bool)
    dead[[2, 7, 11]] = True
    hessian[dead] = 0.0
    hessian[:, dead] = 0.0
    pruned = method(weight, hessian, 0.5)
    assert (pruned[:, dead] == 0).all() and ((pruned == 0).sum(dim=1) == 8).all()
    assert (method(weight, hessian, 0.0)[:, dead] == 0).all()  # nobody reads them
    # The other columns do not notice, except that the mean diagonal is over fewer.
    live = ~dead
    mean = hessian.diagonal()[live].mean()
    torch.testing.assert_close(
        damped_problem(weight, hessian, 0.01)[1][live][:, live],
        hessian[live][:, live] + 0.01 * mean * torch.eye(13, dtype=torch.float64),
    )
    assert (method(weight, torch.zeros_like(hessian), 0.5) == 0).all()


@METHODS
def test_fewer_tokens_than_channels_need_damping(method):
    weight, hessian = problem(6, 40, tokens=10)
    pruned = method(weight.float(), hessian.float(), 0.5)
    assert pruned.isfinite().all()
    with pytest.raises(ValueError, match=r"positive definite after a damping of 0\.0"):
        method(torch.ones(2, 2), torch.ones(2, 2), 0.5, damping=0.0)


@METHODS
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.5}, ValueError, "sparsity must lie in"),
        ({"scope": "global"}, ValueError, "scope must be"),
        ({"damping": -0.1}, ValueError, "damping must be finite and at least 0, got -0.1"),
        ({"damping": math.nan}, ValueError, "damping must be finite"),
        ({"hessian": torch.eye(3)}, ValueError, r"shape \[K=4, 4\], got \[3, 3\]"),
        ({"hessian": torch.eye(4).half()}, TypeError, "float32 or float64, got torch.float16"),
        ({"hessian": torch.eye(4, device="meta")}, TypeError, "hessian must be on cpu, got meta"),
        ({"hessian": torch.eye(4) * math.inf}, ValueError, "hessian must be finite"),
        ({"hessian": -torch.eye(4)}, ValueError, "diagonal not negative"),
        ({"hessian": torch.eye(4) - 2 * torch.eye(4).flip(0)}, ValueError, "positive definite"),
        ({"weight": torch.ones(3)}, ValueError, r"matrix, got shape \[3\]"),
        ({"weight": torch.ones(2, 4).int()}, TypeError, "floating point, got torch.int32"),
        ({"weight": torch.full((2, 4), math.nan)}, ValueError, "weight must be finite"),
    ],
)
def test_refuses(method, arguments, error, message):
    arguments = {
        "weight": torch.ones(2, 4),
        "hessian": torch.eye(4),
        "sparsity": 0.5,
        **arguments,
    }
    with pytest.raises(error, match=message):
        method(**arguments)


def test_sparsegpt_refuses_an_empty_block():
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        sparsegpt(torch.ones(2, 4), torch.eye(4), 0.5, block_size=0)


def test_relative_error_is_what_the_outputs_say():
    generator = torch.Generator().manual_seed(3)
    weight, pruned = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    inputs = torch.randn(7, 30, generator=generator, dtype=torch.float64)
    expected = ((weight - pruned) @ inputs).norm() / (weight @ inputs).norm()
    assert relative_error(weight, pruned, inputs @ inputs.t()) == pytest.approx(expected.item())
    assert relative_error(weight, weight, inputs @ inputs.t()) == 0
    assert relative_error(weight, pruned, torch.zeros(7, 7)) == 0
