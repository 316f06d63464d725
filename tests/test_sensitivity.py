"""Sensitivity against the slow, obvious way, and allocation against trying all shares."""

import copy
import itertools
import json
import logging
import math
import sys

import pytest
import torch
from test_prune import Stack, linear_layers, matrix, tiny, tokens
from torch import nn

import flash_llm
from flash_llm import SensitivityReport, prune_, sensitivity
from flash_llm.prune.allocation import least_error_sparsities
from flash_llm.prune.criteria import magnitude_mask, wanda_mask
from flash_llm.prune.sensitivity import LayerSensitivity

LEVELS = (0.25, 0.5, 0.75)


def inputs_of_the_dense_model(model):
    seen = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, layer in linear_layers(model).items()
    ]
    with torch.no_grad():
        for sample in tokens():
            model.eval()(sample[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(inputs).double() for name, inputs in seen.items()}


@pytest.mark.hf
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_errors_are_those_of_each_layer_pruned_alone(family, method, scope):
    model, _ = tiny(family)
    model.train()
    before = copy.deepcopy(model.state_dict())
    ignore = "lm_head" if family == "gpt2" else ()  # there it is tied
    report = sensitivity(
        model, tokens(), LEVELS[::-1], method=method, scope=scope, seqlen=16, ignore=ignore
    )
    assert report.levels == LEVELS and report.num_samples == 4
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    inputs = inputs_of_the_dense_model(model)
    measured = [name for name in linear_layers(model) if name not in ignore]
    assert [layer.name for layer in report.layers] == measured
    for layer in report.layers:
        weight = matrix(linear_layers(model)[layer.name]).detach()
        x = inputs[layer.name]
        assert layer.shape == tuple(weight.shape) and layer.num_tokens == 64
        for level, error in zip(LEVELS, layer.errors, strict=True):
            norm = x.norm(dim=0).float()
            mask = (
                wanda_mask(weight, norm, level, scope)
                if method == "wanda"
                else magnitude_mask(weight, level, scope)
            )
            change = (x @ (weight * ~mask).double().t()).norm() / (x @ weight.double().t()).norm()
            assert error == pytest.approx(change.item(), rel=1e-3)


def test_the_error_of_an_exact_case():
    model = nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model[1].weight.data = torch.tensor([[3.0, 4.0]])
    report = sensitivity(model, torch.tensor([[0, 1]]), [0.5], seqlen=2)
    assert report.layers == (LayerSensitivity("1", (1, 2), 2, (0.6,)),)
    assert report.allocate(0.5) == {"1": 0.5}


def objective(levels, errors, shares):
    """Sum of the interpolated squares, which are convex in the cases below."""
    total = 0.0
    for known, share in zip(errors, shares, strict=True):
        points = [(0.0, 0.0), *zip(levels, [e * e for e in known], strict=True), (1.0, 1.0)]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x0 <= share <= x1:
                total += y0 + (y1 - y0) * (share - x0) / (x1 - x0)
                break
    return total


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.3, 0.5, 0.65, 0.9, 1.0])
def test_allocation_is_as_good_as_the_best_of_all_shares(sparsity):
    levels, sizes = [0.25, 0.5, 0.75], [100, 300, 200]
    errors = [[0.1, 0.3, 0.6], [0.05, 0.2, 0.5], [0.3, 0.45, 0.7]]
    found = least_error_sparsities(levels, errors, sizes, sparsity, spread=1.0)
    share = sum(s * size for s, size in zip(found, sizes, strict=True)) / sum(sizes)
    assert share == pytest.approx(sparsity, abs=1e-12)
    assert all(0 <= s <= 1 for s in found)
    best = math.inf
    steps = [i / 40 for i in range(41)]
    for first, second in itertools.product(steps, steps):
        third = (sparsity * 600 - 100 * first - 300 * second) / 200
        if -1e-9 <= third <= 1 + 1e-9:
            third = min(max(third, 0.0), 1.0)
            best = min(best, objective(levels, errors, [first, second, third]))
    assert objective(levels, errors, found) <= best + 1e-9


def test_a_bound_beside_a_level_by_rounding_does_not_miss_the_target():
    # 0.65 + 0.05 is 1e-16 above the level 0.7: a segment whose slope is noise.
    levels = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    errors = [[0.09, 0.14, 0.2, 0.33, 0.39, 0.46], [0.04, 0.08, 0.24, 0.31, 0.38, 0.55]]
    found = least_error_sparsities(levels, errors, [1, 1], 0.65, 0.05)
    assert sum(found) / 2 == pytest.approx(0.65, abs=1e-12)


@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.3, 0.5, 0.55, 0.65, 0.85, 0.97, 1.0])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.2])
def test_no_layer_is_pruned_far_from_the_target(sparsity, spread):
    # On SmolLM2 errors alone put 0.8 on some layers and none on others: 10 times the perplexity.
    levels, sizes = [0.25, 0.5, 0.75], [100, 300, 200]
    errors = [[0.01, 0.02, 0.03], [0.5, 0.9, 0.95], [0.3, 0.45, 0.7]]
    found = least_error_sparsities(levels, errors, sizes, sparsity, spread)
    share = sum(s * size for s, size in zip(found, sizes, strict=True)) / sum(sizes)
    assert share == pytest.approx(sparsity, abs=1e-12)
    assert all(0 <= s <= 1 and abs(s - sparsity) <= spread + 1e-12 for s in found)
    if 0.2 < sparsity <= 0.5:
        assert found[0] == pytest.approx(sparsity + spread)  # hardly sensitive at all


def test_alike_layers_get_alike_shares_and_dents_are_bridged():
    assert least_error_sparsities([0.5], [[0.5], [0.5]], [10, 10], 0.25, spread=1.0) in (
        [0.5, 0.0],
        [0.0, 0.5],
    )  # linear between the levels: it does not matter which
    assert least_error_sparsities([0.5], [[0.5], [0.5]], [10, 30], 0.5) == [0.5, 0.5]
    # Not convex: at 0.6 hardly worse than at 0.3, so 0.3 is no corner of the hull.
    found = least_error_sparsities([0.3, 0.6], [[0.5, 0.51], [0.2, 0.9]], [10, 10], 0.45, 1.0)
    assert found == pytest.approx([0.6, 0.3])
    assert least_error_sparsities([0.5], [], [], 0.5) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 0.5], [[0.1, 0.2]], [1], 0.5), "levels must rise"),
        (([0.0], [[0.1]], [1], 0.5), "levels must rise"),
        (([0.5], [[0.1]], [1], 1.5), "sparsity must lie in"),
        (([0.5], [[0.1]], [1, 2], 0.5), "one size of at least 1 per layer"),
        (([0.5], [[0.1]], [0], 0.5), "one size of at least 1 per layer"),
        (([0.5], [[0.1, 0.2]], [1], 0.5), "must have 1 finite errors"),
        (([0.5], [[math.nan]], [1], 0.5), "must have 1 finite errors"),
        (([0.5], [[0.1]], [1], 0.5, -0.1), "spread must be finite and not negative"),
    ],
)
def test_allocation_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        least_error_sparsities(*arguments)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_prune_takes_the_allocation(method, tmp_path):
    model = Stack()
    with torch.no_grad():
        model.blocks[1].up.weight[:, :2] *= 50.0
    expected = copy.deepcopy(model)
    options = {"method": method, "sparsity": 0.5, "calibration": tokens(), "seqlen": 16}
    shares = sensitivity(model, tokens(), seqlen=16).allocate(0.5)
    report = prune_(model, **options, allocation="sensitivity", resume_dir=tmp_path)
    prune_(expected, **{**options, "sparsity": None}, allocation=shares)
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(shares[layer.name], abs=0.5 / layer.shape[1])
    assert report.sparsity == pytest.approx(0.5, abs=0.05)
    assert len({layer.sparsity for layer in report.layers}) > 2
    assert json.loads((tmp_path / "allocation.json").read_text()) == shares


def test_a_layer_that_no_token_reaches_gets_the_target(caplog):
    model = Stack()
    model.unused = nn.Linear(8, 8)
    with caplog.at_level(logging.WARNING, "flash_llm"):
        report = sensitivity(model, tokens(), seqlen=16)
    assert "no calibration token reached unused" in caplog.text
    assert report.layers[-1] == LayerSensitivity("unused", (8, 8), 0, ())
    assert report.allocate(0.4)["unused"] == 0.4
    assert str(report).splitlines()[-2].split() == ["unused", "8x8", *["-"] * len(report.levels)]


def test_blocks_in_another_order_are_measured_in_one_pass():
    model = Stack(order=(2, 1, 0))
    report = sensitivity(model, tokens(), LEVELS, seqlen=16)
    inputs = inputs_of_the_dense_model(model)
    for layer in report.layers:
        weight, x = linear_layers(model)[layer.name].weight.detach(), inputs[layer.name]
        mask = wanda_mask(weight, x.norm(dim=0).float(), 0.5)
        change = (x @ (weight * ~mask).double().t()).norm() / (x @ weight.double().t()).norm()
        assert layer.errors[1] == pytest.approx(change.item(), rel=1e-3)
    report = prune_(model, sparsity=0.5, allocation="sensitivity", calibration=tokens(), seqlen=16)
    assert report.sparsity == pytest.approx(0.5, abs=0.05)


def test_report_as_table_file_and_figure(tmp_path, monkeypatch):
    report = sensitivity(Stack(), tokens(), LEVELS, seqlen=16)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "shape", "0.25", "0.5", "0.75"]
    assert lines[1].split()[:2] == ["blocks.0.up", "16x8"] and len(lines) == 8
    assert float(lines[1].split()[2]) == pytest.approx(report.layers[0].errors[0], abs=1e-4)
    stored = json.loads(report.save(tmp_path).read_text())
    assert stored == json.loads(report.to_json())
    assert stored["layers"][0]["errors"] == list(report.layers[0].errors)
    assert (tmp_path / "sensitivity_report.json").exists()

    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    figure = report.plot(tmp_path / "sensitivity.png")
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    ups = [layer.errors for layer in report.layers if layer.name.endswith("up")]
    assert list(lines) == ["up", "down"]
    assert list(lines["up"]) == pytest.approx([sorted(e)[1] for e in zip(*ups, strict=True)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'flash-llm\[plot\]'"):
        report.plot()


def test_there_is_nothing_to_plot():
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    empty = SensitivityReport("wanda", (0.5,), (LayerSensitivity("a", (1, 1), 0, ()),), 1, 0.0)
    with pytest.raises(ValueError, match="nothing to plot"):
        empty.plot()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"levels": []}, ValueError, "levels must be different sparsities"),
        ({"levels": [0.5, 0.5]}, ValueError, "levels must be different sparsities"),
        ({"levels": [0.0, 0.5]}, ValueError, r"in \(0, 1\), got \[0.0, 0.5\]"),
        ({"levels": [1.5]}, ValueError, "sparsity must lie in"),
        ({"levels": [None]}, ValueError, "sparsity must be given"),
        ({"method": "admm"}, ValueError, "method must be one of magnitude, wanda,"),
        ({"scope": "2:4"}, ValueError, 'scope must be "row" or "layer"'),
        ({"calibration": []}, ValueError, "holds no tokens"),
        ({"targets": "nothing"}, ValueError, "nothing"),
    ],
    ids=str,
)
def test_sensitivity_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        sensitivity(**{"model": Stack(), "calibration": tokens(), **arguments})


def test_it_is_public():
    assert flash_llm.sensitivity is sensitivity


@pytest.mark.hf
def test_no_cache_of_an_earlier_call_reaches_a_layer():
    from test_prune import Wrapper, tiny

    model, _ = tiny("llama")
    options = {"ignore": ("lm_head",), "levels": (0.5,)}
    expected = sensitivity(model, tokens(), **options).layers
    found = sensitivity(Wrapper(model), tokens(), **options).layers
    assert [layer.errors for layer in found] == [layer.errors for layer in expected]
