"""Rounding while pruning: grids, and the sweep against a slow, literal oracle in float64."""

import copy
import math

import pytest
import torch
from test_prune import linear_layers, tiny, tokens
from test_reconstruction import damp, objective, problem

from flash_llm import prune_, recover_
from flash_llm.prune.admm import admm
from flash_llm.prune.criteria import magnitude_mask
from flash_llm.prune.gptq import gptq
from flash_llm.prune.reconstruction import relative_error
from flash_llm.prune.sparsegpt import sparsegpt
from flash_llm.quantize import GRIDS, SHRINK, round_to_grid

SYMMETRIC = ("int8", "fp8_e4m3", "int4")
LARGEST = {"int8": 127, "fp8_e4m3": 448, "int4": 7}
WITH_ZERO_POINT = {"int4_asymmetric": 4, "int3": 3, "int2": 2}
E4M3 = sorted(
    {m / 8 * 2.0**-6 for m in range(8)}
    | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)}
)


def as_half(number):
    return torch.tensor(number, dtype=torch.float64).float().half().double().item()


def as_single(number):
    return torch.tensor(number, dtype=torch.float64).float().double().item()


def rounding(weights, values, fraction=1.0):
    """The grid of one row of one group: a function that rounds a number, and its largest step."""
    if values in WITH_ZERO_POINT:
        steps = 2 ** WITH_ZERO_POINT[values] - 1
        low, high = min(0.0, *weights) * fraction, max(0.0, *weights) * fraction
        scale = as_half((high - low) / steps) or 1.0
        first = round(low / scale)
        return lambda x: scale * min(max(round(x / scale), first), first + steps), None
    largest = LARGEST[values]
    end = as_single(max(map(abs, weights)) * fraction)
    scale = (as_half if values == "int4" else as_single)(end / largest)
    # As packed weights store it: not smaller than the smallest normal number of float16.
    scale = max(scale, 2.0**-14 if values == "int4" else 0.0) if end else 1.0

    def nearest(x):
        if values != "fp8_e4m3":
            return scale * min(max(round(x / scale), -largest), largest)
        magnitude = abs(x / scale)
        step = min(E4M3, key=lambda e: (abs(e - magnitude), E4M3.index(e) % 2))
        return math.copysign(step * scale, x)

    return nearest, largest * scale


def slow_gptq(weight, hessian, values):
    """GPTQ as its paper says it, with the inverse computed anew per column; zeros stay zeros."""
    weight, (rows, cols) = weight.clone(), weight.shape
    kept, row_grids = weight != 0, {}
    size = GRIDS[values].group or cols
    inverses = [torch.linalg.inv(damp(hessian)[j:, j:]) for j in range(cols)]
    for j in range(cols):
        for r in range(rows):
            if j % size == 0:
                columns = range(j, min(j + size, cols))
                group = [weight[r, c].item() if kept[r, c] else 0.0 for c in columns]
                errors = []
                for fraction in SHRINK:
                    nearest, _ = rounding(group, values, fraction)
                    errors.append(
                        sum(
                            (w - nearest(w)) ** 2 / inverses[c][0, 0].item()
                            for w, c in zip(group, columns, strict=True)
                        )
                    )
                best = SHRINK[errors.index(min(errors))]
                nearest, end = rounding(group, values, best)
                largest = max(range(len(group)), key=lambda c: abs(group[c]))
                row_grids[r] = nearest, end, j + largest, math.copysign(1.0, group[largest])
            nearest, end, anchor, sign = row_grids[r]
            new = nearest(weight[r, j].item()) if kept[r, j] else 0.0
            if j == anchor and end is not None and kept[r, j]:
                new = sign * end
            error = (weight[r, j] - new) / inverses[j][0, 0]
            weight[r, j:] -= error * inverses[j][0]
            weight[r, j] = new
    return weight


def pruned_problem(rows, cols, seed=0):
    """A weight of which half is zero, one row and one group of another row wholly."""
    weight, hessian = problem(rows, cols, seed)
    weight = weight * magnitude_mask(weight, 0.5)
    weight[0] = 0.0
    weight[-1, 128:] = 0.0
    return weight, hessian


@pytest.mark.parametrize("values", GRIDS)
def test_the_sweep_is_gptq_on_the_support(values):
    for weight, hessian in (problem(3, 150), pruned_problem(4, 150), problem(2, 1), problem(1, 9)):
        found = gptq(weight, hessian, values)
        torch.testing.assert_close(found, slow_gptq(weight, hessian, values), rtol=1e-9, atol=1e-9)
        assert (found[weight == 0] == 0).all()


@pytest.mark.parametrize("values", SYMMETRIC)
def test_rounding_sparsegpts_weight_is_rounding_inside_its_sweep(values):
    """One sweep from the dense weight, which prunes, rounds and compensates both errors."""
    weight, hessian = problem(5, 60)
    pruned = sparsegpt(weight, hessian, 0.5)
    found = gptq(pruned, hessian, values)
    inverse = [torch.linalg.inv(damp(hessian)[j:, j:]) for j in range(60)]
    joint = weight.clone()
    for r in range(5):
        # The scale, and the weight that is rounded to the end of the grid, are the only freedom.
        end = found[r].abs().max().item()
        anchor = int(pruned[r].abs().argmax())
        nearest, _ = rounding([end], values)
        assert found[r, anchor].abs().item() == pytest.approx(end, rel=1e-12)
        for j in range(60):
            new = nearest(joint[r, j].item()) if pruned[r, j] != 0 else 0.0
            new = found[r, j].item() if j == anchor else new
            joint[r, j:] -= (joint[r, j] - new) / inverse[j][0, 0] * inverse[j][0]
            joint[r, j] = new
    torch.testing.assert_close(found, joint, rtol=1e-6, atol=1e-9)


def awkward(dtype):
    """Rows that are zero, of one weight, of weights of very different size, and too small."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(9, 300, generator=generator) * torch.rand(9, 1, generator=generator)
    weight *= magnitude_mask(weight, 0.5)
    weight[0] = 0.0
    weight[1, 1:] = 0.0
    weight[2] *= 1e-4
    weight[3, :128] = 0.0
    weight[4] = torch.arange(300) - 150
    weight[5] = weight[5].exp() * weight[5]
    weight[6, 17] = 40.0
    weight[7] *= 1e-8
    return weight.to(dtype)


@pytest.mark.parametrize("cols", [1, 127, 128, 300])
@pytest.mark.parametrize("values", GRIDS)
def test_rounding_to_nearest(values, cols, dtype, device):
    weight = awkward(dtype)[:7, :cols].to(device)
    rounded = round_to_grid(weight, values).cpu()
    assert rounded.dtype == dtype and rounded.is_contiguous()
    size = GRIDS[values].group or cols
    for row, found in zip(weight.double().tolist(), rounded.double(), strict=True):
        for begin in range(0, cols, size):
            group = torch.tensor(row[begin : begin + size], dtype=torch.float64)
            nearest, _ = rounding(group.tolist(), values)
            expected = torch.tensor(list(map(nearest, group.tolist())), dtype=torch.float64)
            off = (found[begin : begin + size] - group).abs()
            # float32 decides near ties: both neighbours are right there.
            slack = torch.finfo(dtype).eps * group.abs() + (6e-8 if dtype == torch.float16 else 0)
            assert (off <= (expected - group).abs() * (1 + 1e-4) + slack).all()


@pytest.mark.parametrize("values", SYMMETRIC)
def test_a_rounded_weight_tells_its_scales(values, dtype, device):
    weight, hessian = awkward(dtype).to(device), problem(1, 300)[1].float().to(device)
    for rounded in (round_to_grid(weight, values), gptq(weight, hessian, values)):
        assert rounded.isfinite().all() and (rounded[weight == 0] == 0).all()
        assert torch.equal(round_to_grid(rounded, values), rounded)
        for group in rounded.cpu().split(GRIDS[values].group or 300, dim=1):
            for row in group.double():
                assert row.unique().numel() <= 2 * LARGEST[values] + 1


@pytest.mark.parametrize("values", GRIDS)
def test_the_sweep_is_better_than_rounding_to_nearest(values):
    weight, hessian = problem(32, 200)
    for before in (weight, sparsegpt(weight, hessian, 0.5), admm(weight, hessian, 0.5)):
        swept = objective(before, gptq(before, hessian, values), damp(hessian))
        nearest = objective(before, round_to_grid(before, values), damp(hessian))
        assert swept < 0.8 * nearest
    # 8 bits cost next to nothing beside the zeros.
    if values == "int8":
        error = relative_error(weight, gptq(before, hessian, values), hessian)
        assert error < 1.01 * relative_error(weight, before, hessian)


@pytest.mark.parametrize("values", SYMMETRIC)
def test_a_scale_that_overflows_gives_no_numbers(values):
    weight = torch.tensor([[3e38, 1.0], [2.0, 1.0]])
    rounded = round_to_grid(weight, values)
    assert rounded[1].isfinite().all()
    assert bool(rounded[0].isfinite().all()) == (values != "int4")


@pytest.mark.parametrize("function", [lambda w, v: gptq(w, torch.eye(2), v), round_to_grid])
@pytest.mark.parametrize(
    ("weight", "values", "error", "message"),
    [
        (torch.ones(1, 2), "int5", ValueError, "values must be one of int8.*got 'int5'"),
        (torch.ones(1, 2), None, ValueError, "values must be one of"),
        (torch.full((1, 2), math.nan), "int8", ValueError, "weight must be finite"),
        (torch.full((1, 2), math.inf), "int4", ValueError, "weight must be finite"),
        (torch.ones(2), "int8", ValueError, r"matrix, got shape \[2\]"),
        (torch.ones(1, 2).int(), "int8", TypeError, "floating point, got torch.int32"),
    ],
)
def test_bad_weights_and_values_are_refused(function, weight, values, error, message):
    with pytest.raises(error, match=message):
        function(weight, values)


def test_gptq_refuses_what_the_problem_refuses():
    with pytest.raises(ValueError, match=r"shape \[K=2, 2\], got \[3, 3\]"):
        gptq(torch.ones(1, 2), torch.eye(3), "int8")
    with pytest.raises(ValueError, match="positive definite"):
        gptq(torch.ones(1, 2), torch.ones(2, 2), "int8", damping=0.0)


@pytest.mark.hf
@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("llama", method) for method in ("magnitude", "wanda", "sparsegpt", "admm")),
        ("gpt2", "sparsegpt"),  # weights are transposed
    ],
)
def test_pruned_models_lie_on_their_grids(family, method):
    dense = tiny(family)[0].bfloat16()
    options = {"method": method, "sparsity": 0.5, "calibration": tokens(), "seqlen": 16}
    plain = copy.deepcopy(dense)
    prune_(plain, **options)
    for values in SYMMETRIC:
        model = copy.deepcopy(dense)
        report = prune_(model, **options, values=values)
        assert report.recipe.values == values and values in str(report)
        assert type(report.recipe)(**vars(report.recipe)) == report.recipe
        for entry in report.layers:
            layer, unrounded = model.get_submodule(entry.name), plain.get_submodule(entry.name)
            conv1d = type(layer).__name__ == "Conv1D"
            weight, before = (m.weight.t() if conv1d else m.weight for m in (layer, unrounded))
            assert weight.dtype == torch.bfloat16
            assert torch.equal(round_to_grid(weight, values), weight)
            if method == "magnitude":
                assert torch.equal(weight, round_to_grid(before, values))
            assert entry.sparsity == (weight == 0).double().mean().item() >= 0.5


def test_global_pruning_rounds_too():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    prune_(model, method="magnitude", scope="global", sparsity=0.5, values="int4")
    weights = [layer.weight for layer in model]
    assert all(torch.equal(round_to_grid(weight, "int4"), weight) for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) >= 48


@pytest.mark.hf
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recovery_stays_on_the_grid(family):
    dense = tiny(family)[0]
    options = {"calibration": tokens(), "seqlen": 16}
    for values in SYMMETRIC:
        model = copy.deepcopy(dense)
        prune_(model, method="sparsegpt", sparsity=0.5, values=values, **options)
        before = copy.deepcopy(model)
        report = recover_(model, dense, epochs=4, learning_rate=1e-3, values=values, **options)
        assert report.blocks[0].after < report.blocks[0].before
        moved = 0
        for name, layer in linear_layers(model).items():
            if name == "lm_head":
                continue
            conv1d = type(layer).__name__ == "Conv1D"
            weight = layer.weight.t() if conv1d else layer.weight
            assert torch.equal(round_to_grid(weight, values), weight)
            old = before.get_submodule(name).weight
            assert (layer.weight[old == 0] == 0).all()
            moved += not torch.equal(layer.weight, old)
        assert moved > 0


@pytest.mark.hf
def test_recovery_and_pruning_refuse_unknown_values():
    dense = tiny("llama")[0]
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match="values must be one of int8.*got 'int5'"):
        recover_(dense, dense, calibration=tokens(), seqlen=16, values="int5")
    with pytest.raises(ValueError, match="values must be one of int8.*got 'int5'"):
        prune_(dense, sparsity=0.5, calibration=tokens(), values="int5")
    assert all(map(torch.equal, dense.state_dict().values(), before.values()))


@pytest.mark.hf
def test_a_layer_beyond_the_scales_is_named():
    model = tiny("llama")[0].bfloat16()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj overflow int4"):
        prune_(model, method="magnitude", sparsity=0.5, values="int4")
