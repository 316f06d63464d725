"""Criteria against brute force, and the driver against the slow, obvious way to do the same."""

import copy
import itertools
import json
import logging
import math

import pytest
import torch
from torch import nn

import flash_llm
from flash_llm import prune_
from flash_llm.prune.allocation import outlier_ratio, owl_sparsities
from flash_llm.prune.blocks import calibration_mode, find_stacks, record_calls
from flash_llm.prune.criteria import (
    drop_smallest,
    global_magnitude_masks,
    magnitude_mask,
    num_pruned,
    wanda_mask,
)
from flash_llm.prune.inputs import collect_inputs, gram, squares
from flash_llm.prune.methods import METHODS, Method

SPARSITIES = [0.0, 0.1, 0.5, 0.6, 0.95, 1.0]
SHAPES = [(0, 5), (3, 0), (1, 1), (3, 7), (5, 12), (2, 65)]


def brute_force_mask(score, sparsity, scope):
    """Plain Python: sort the elements of each group by (score, position), drop the first p."""
    rows, cols = score.shape
    if scope == "layer":
        groups = [list(itertools.product(range(rows), range(cols)))]
    elif scope == "row":
        groups = [[(row, col) for col in range(cols)] for row in range(rows)]
    else:
        keep, size = map(int, scope.split(":"))
        groups = [
            [(row, col) for col in range(start, min(start + size, cols))]
            for row in range(rows)
            for start in range(0, cols, size)
        ]
    mask = torch.ones(rows, cols, dtype=torch.bool)
    for group in groups:
        if ":" in scope:
            drop = max(len(group) - keep, 0)
        else:
            drop = math.floor(sparsity * len(group) + 0.5)
        for row, col in sorted(group, key=lambda place: (score[place].item(), place))[:drop]:
            mask[row, col] = False
    return mask


@pytest.mark.parametrize("scope", ["row", "layer", "2:4", "1:3", "3:3"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ties", [True, False])
def test_masks_equal_brute_force(shape, scope, ties):
    generator = torch.Generator().manual_seed(shape[0] * 100 + shape[1])
    draw = torch.randint(-3, 4, shape, generator=generator).float()
    weight = draw if ties else torch.randn(shape, generator=generator)
    norm = torch.rand(shape[1], generator=generator).mul(4).floor()
    for sparsity in [None] if ":" in scope else SPARSITIES:
        expected = brute_force_mask(weight.abs(), sparsity, scope)
        assert torch.equal(magnitude_mask(weight, sparsity, scope), expected)
        expected = brute_force_mask(weight.abs() * norm, sparsity, scope)
        assert torch.equal(wanda_mask(weight, norm, sparsity, scope), expected)


@pytest.mark.parametrize("count", [0, 1, 7, 20, 31, 39, 40])
def test_drop_smallest_is_a_stable_sort_in_which_nan_is_largest(count, device):
    score = torch.randint(0, 5, (50, 40)).float()
    score[:10, ::3] = math.nan
    score[5:20, 1::4] = math.inf
    score[20] = math.nan
    order = score.sort(dim=1, stable=True).indices
    expected = torch.ones_like(score, dtype=torch.bool).scatter_(1, order[:, :count], False)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(drop_smallest(score.to(device, dtype), count).cpu(), expected), dtype
    assert torch.equal(drop_smallest(score.to(device).requires_grad_(), count).cpu(), expected)
    threads = torch.get_num_threads()
    try:  # many threads and few go different ways
        torch.set_num_threads(8)
        assert torch.equal(drop_smallest(score.to(device), count).cpu(), expected)
    finally:
        torch.set_num_threads(threads)
    assert drop_smallest(score[:0].to(device), count).shape == (0, 40)


@pytest.mark.parametrize("cols", [1, 2, 5, 64, 577])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_every_row_loses_exactly_the_rounded_count(cols, sparsity):
    mask = wanda_mask(torch.randn(9, cols).bfloat16(), torch.rand(cols), sparsity)
    assert ((~mask).sum(dim=1) == num_pruned(sparsity, cols)).all()
    assert num_pruned(sparsity, cols) == math.floor(sparsity * cols + 0.5)


@pytest.mark.parametrize("scope", ["row", "layer", "2:4", "7:16"])
def test_magnitude_mask_prunes_what_prune_pack_prunes(dtype, scope):
    weight = torch.randint(-9, 10, (37, 131)).to(dtype)
    weight[3, 4] = torch.inf
    weight[5, 6] = torch.nan
    sparsity = None if ":" in scope else 0.55
    in_cpp = flash_llm.unpack(flash_llm.prune_pack(weight, sparsity, scope=scope))
    in_python = weight.masked_fill(~magnitude_mask(weight, sparsity, scope), 0.0)
    torch.testing.assert_close(in_python, in_cpp, rtol=0, atol=0, equal_nan=True)


def test_wanda_weighs_weights_by_their_inputs():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5]], dtype=torch.bfloat16)
    ones = torch.ones(4)
    assert torch.equal(wanda_mask(weight, ones, 0.5), magnitude_mask(weight, 0.5))
    assert wanda_mask(weight, torch.tensor([9.0, 1.0, 1.0, 9.0]), 0.5).tolist() == [
        [True, False, False, True]
    ]
    # float16 would overflow to Inf on both products, and the tie would keep the wrong one
    large = torch.tensor([[3.0, 2.0]], dtype=torch.float16)
    assert wanda_mask(large, torch.tensor([6e4, 6e4]), 0.5).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": -0.1}, ValueError, r"sparsity must lie in \[0, 1\], got -0.1"),
        ({"sparsity": 1.5}, ValueError, r"sparsity must lie in \[0, 1\], got 1.5"),
        ({"sparsity": math.nan}, ValueError, r"sparsity must lie in \[0, 1\], got nan"),
        ({"sparsity": "0.5"}, TypeError, "sparsity must be a number"),
        ({"sparsity": True}, TypeError, "sparsity must be a number"),
        ({"sparsity": None}, ValueError, 'sparsity must be given for scope "row"'),
        ({"sparsity": 0.5, "scope": "column"}, ValueError, 'scope must be "row"'),
        ({"sparsity": 0.5, "scope": "4:2"}, ValueError, 'got "4:2"'),
        ({"sparsity": 0.5, "scope": "0:4"}, ValueError, 'got "0:4"'),
        ({"sparsity": 0.5, "scope": "2:65"}, ValueError, "M <= 64"),
        ({"sparsity": 0.6, "scope": "2:4"}, ValueError, "sparsity must be 0.5 for scope"),
        ({"sparsity": 0.5, "scope": 2}, TypeError, "scope must be a string"),
        ({"sparsity": 0.5, "weight": torch.ones(3)}, ValueError, r"matrix, got shape \[3\]"),
        (
            {"sparsity": 0.5, "weight": torch.ones(2, 2, dtype=torch.int32)},
            TypeError,
            "torch.int32",
        ),
    ],
)
def test_criteria_refuse(arguments, error, message):
    arguments = {"weight": torch.ones(2, 4), **arguments}
    with pytest.raises(error, match=message):
        magnitude_mask(**arguments)


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        (torch.ones(3), ValueError, r"must have shape \[K=4\], got \[3\]"),
        (torch.ones(4, dtype=torch.int64), TypeError, "input_norm must be floating point"),
        (torch.tensor([1.0, -1.0, 1.0, 1.0]), ValueError, "finite and not negative"),
        (torch.tensor([1.0, math.inf, 1.0, 1.0]), ValueError, "finite and not negative"),
        (torch.tensor([1.0, math.nan, 1.0, 1.0]), ValueError, "finite and not negative"),
    ],
)
def test_wanda_refuses_a_wrong_norm(norm, error, message):
    with pytest.raises(error, match=message):
        wanda_mask(torch.ones(2, 4), norm, 0.5)


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_global_masks_equal_one_sort_over_all(sparsity, ties, dtype):
    shapes = [(3, 7), (0, 4), (5, 12), (1, 1), (40, 3)]
    weights = [
        torch.randint(-3, 4, shape).to(dtype) if ties else torch.randn(shape) for shape in shapes
    ]
    weights[3][0, 0] = math.nan
    weights[0] = weights[0].t()  # any strides
    together = torch.cat([weight.flatten() for weight in weights])[None]
    expected = magnitude_mask(together, sparsity)[0].split([weight.numel() for weight in weights])
    masks = []
    for weight, mask in zip(weights, global_magnitude_masks(weights, sparsity), strict=True):
        masks.append(mask)
        weight.masked_fill_(~mask, 0.0)
    for mask, flat in zip(masks, expected, strict=True):
        assert torch.equal(mask.flatten(), flat)


def test_global_masks_refuse():
    with pytest.raises(ValueError, match="sparsity must lie in"):
        list(global_magnitude_masks([torch.ones(2, 2)], 1.5))
    with pytest.raises(TypeError, match="floating point, got torch.int64"):
        list(global_magnitude_masks([torch.ones(2, 2), torch.ones(2, 2).long()], 0.5))
    assert list(global_magnitude_masks([], 0.5)) == []


@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.5, 0.6, 0.95, 1.0])
def test_owl_keeps_the_mean_the_bounds_and_the_order(sparsity):
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        ratios = torch.rand(12, generator=generator, dtype=torch.float64).pow(4).tolist()
        sizes = torch.randint(1, 1000, (12,), generator=generator).tolist()
        found = owl_sparsities(ratios, sizes, sparsity)
        mean = sum(s * size for s, size in zip(found, sizes, strict=True)) / sum(sizes)
        assert mean == pytest.approx(sparsity, abs=1e-12)
        assert all(0 <= s <= 1 and abs(s - sparsity) <= 0.08 + 1e-12 for s in found)
        if 0.08 <= sparsity <= 0.92:
            assert max(abs(s - sparsity) for s in found) == pytest.approx(0.08)
        by_ratio = [s for _, s in sorted(zip(ratios, found, strict=True))]
        assert by_ratio == sorted(found, reverse=True)
    assert owl_sparsities([0.2, 0.2], [1, 5], sparsity) == [sparsity, sparsity]
    assert owl_sparsities([], [], sparsity) == []


def test_outlier_ratio_is_over_all_layers_of_a_block():
    weights = [torch.randn(7, 5).bfloat16(), torch.randn(4, 9).bfloat16()]
    norms = [torch.rand(5), torch.rand(9) * 30]
    scores = torch.cat(
        [(w.float().abs() * n).flatten() for w, n in zip(weights, norms, strict=True)]
    )
    for threshold in (0.5, 1.0, 3.0, 5.0):
        expected = (scores > threshold * scores.mean()).float().mean().item()
        assert outlier_ratio(weights, norms, threshold) == pytest.approx(expected)
    assert outlier_ratio([], []) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: owl_sparsities([0.1], [1, 2], 0.5), "one size per ratio"),
        (lambda: owl_sparsities([0.1], [1], 1.5), "sparsity must lie in"),
        (lambda: owl_sparsities([math.nan], [1], 0.5), "finite and not negative"),
        (lambda: owl_sparsities([0.1], [1], 0.5, -0.1), "finite and not negative"),
        (lambda: outlier_ratio([torch.ones(2, 2)], [torch.ones(2)], 0.0), "threshold must be"),
        (lambda: outlier_ratio([torch.ones(2)], [torch.ones(2)]), "matrix"),
        (lambda: outlier_ratio([torch.ones(2, 2)], []), "shorter"),
    ],
)
def test_allocation_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def tiny(family):
    """A random model of few blocks, its blocks, and the names of its linear layers in a block."""
    transformers = pytest.importorskip("transformers")
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=61, n_embd=24, n_layer=3, n_head=2, n_positions=64
        )
    else:
        name, more = {
            "llama": ("LlamaConfig", {}),
            "qwen2": ("Qwen2Config", {}),
            # Its blocks take turns between two masks and two sets of position embeddings.
            "gemma3": (
                "Gemma3TextConfig",
                {
                    "head_dim": 12,
                    "sliding_window": 4,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                },
            ),
        }[family]
        config = getattr(transformers, name)(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            **more,
        )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    return model, blocks


def linear_layers(module):
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    }


def matrix(layer):
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


def tokens(samples=4, length=16, vocabulary=61):
    return torch.randint(
        0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(2)
    )


def reconstruct_the_slow_way(model, groups, samples, reconstruct):
    """For each group of layers: run the whole model, gather each layer's Gram, solve, go on."""
    errors = []
    for layers in groups:
        seen = {layer: [] for layer in layers}
        handles = [
            layer.register_forward_pre_hook(
                lambda layer, args, seen=seen: seen[layer].append(args[0].clone())
            )
            for layer in layers
        ]
        with torch.no_grad():
            for sample in samples:
                model.eval()(sample[None])
            for layer in layers:
                weight, x = matrix(layer).detach(), torch.cat([s[0] for s in seen[layer]]).double()
                pruned = reconstruct(weight.double(), x.t() @ x, 0.5)
                change = (x @ (weight.double() - pruned).t()).norm()
                errors.append((change / (x @ weight.double().t()).norm()).item())
                matrix(layer).copy_(pruned)
        for handle in handles:
            handle.remove()
    return errors


def prune_the_slow_way(model, groups, samples, sparsity):
    """For each group of layers: run the whole model as it stands, gather norms, prune the group."""
    for layers in groups:
        sum_sq = {layer: 0.0 for layer in layers}

        def add(layer, args, sum_sq=sum_sq):
            sum_sq[layer] += args[0].double().square().flatten(0, -2).sum(dim=0)

        handles = [layer.register_forward_pre_hook(add) for layer in layers]
        with torch.no_grad():
            for sample in samples:
                model.eval()(sample[None])
            for layer in layers:
                mask = brute_force_mask(
                    matrix(layer).float().abs() * sum_sq[layer].sqrt().float(), sparsity, "row"
                )
                matrix(layer).mul_(mask)
        for handle in handles:
            handle.remove()


@pytest.mark.hf
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2"])
def test_each_block_is_calibrated_on_the_pruned_blocks_before_it(family):
    model, blocks = tiny(family)
    expected, one_pass = copy.deepcopy(model), copy.deepcopy(model)
    base = model.base_model_prefix
    stack = "h" if family == "gpt2" else "layers"
    groups = [linear_layers(b).values() for b in getattr(getattr(expected, base), stack)]
    prune_the_slow_way(expected, groups, tokens(), 0.7)
    blocks_of_one_pass = getattr(getattr(one_pass, base), stack)
    prune_the_slow_way(one_pass, [linear_layers(blocks_of_one_pass).values()], tokens(), 0.7)

    report = prune_(model, sparsity=0.7, calibration=tokens())
    assert all(layer.sequential and layer.num_tokens == 64 for layer in report.layers)
    state = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    # The oracle can tell the two apart: without the sequence, other weights would go.
    assert any(not torch.equal(state[name], t) for name, t in one_pass.state_dict().items())
    assert len(report.layers) == len(linear_layers(blocks))


@pytest.mark.hf
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_each_block_is_reconstructed_on_the_pruned_blocks_before_it(family, method):
    model, _ = tiny(family)
    expected = copy.deepcopy(model)
    stack = expected.transformer.h if family == "gpt2" else expected.model.layers
    groups = [linear_layers(block).values() for block in stack]
    errors = reconstruct_the_slow_way(expected, groups, tokens(), METHODS[method].function)

    report = prune_(model, method=method, sparsity=0.5, calibration=tokens())
    # float32 against float64: a near tie may fall the other way, and all that follows with it.
    found = [layer.error for layer in report.layers]
    assert found == pytest.approx(errors, rel=0.1)
    assert all(layer.sequential and layer.num_tokens == 64 for layer in report.layers)
    assert report.sparsity == 0.5
    first, other = (next(iter(linear_layers(m).values())) for m in (model, expected))
    same = (first.weight == 0) == (other.weight == 0)
    assert same.float().mean() > 0.99
    torch.testing.assert_close(first.weight[same], other.weight[same], rtol=1e-2, atol=1e-3)


@pytest.mark.hf
@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_reconstruction_is_exact_in_count_and_leaves_the_rest_alone(method, dtype):
    model, _ = tiny("llama")
    model.to(dtype)
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    report = prune_(model, method=method, sparsity=0.55, calibration=tokens())
    pruned = {layer.name for layer in report.layers}
    assert len(pruned) == 21 and all(0 < layer.error < 1 for layer in report.layers)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        if name.removesuffix(".weight") in pruned:
            assert ((tensor == 0).sum(dim=1) == num_pruned(0.55, tensor.shape[1])).all()
        else:
            assert torch.equal(tensor, before[name])
    prune_(twin, method=method, sparsity=0.55, calibration=tokens())
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


def test_preserve_mask_reaches_the_methods():
    model = Stack()
    for layer in linear_layers(model).values():
        layer.weight.data[:, ::4] = 0.0
    prune_(model, method="admm", sparsity=0.5, calibration=tokens(), preserve_mask=True)
    for layer in linear_layers(model).values():
        assert (layer.weight[:, ::4] == 0).all()
        assert ((layer.weight == 0).float().mean(dim=1) == 0.5).all()


class Projections(nn.Module):
    """Four layers, of which the second changes its mind about whose input it shares."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, apart=False):
        q = self.q(x)
        k = self.k(x + 1.0 if apart else x)
        v = self.v(x)
        return self.o(q + k + v)


def test_layers_with_the_same_inputs_share_one_gram():
    model = Projections()
    first, second = torch.randn(2, 5, 6)
    with collect_inputs(linear_layers(model), gram) as inputs, torch.no_grad():
        model(first)
        model(second)
        assert inputs["q"] is inputs["k"] is inputs["v"] is not inputs["o"]
        both = torch.cat([first, second])
        torch.testing.assert_close(inputs["q"].total, both.t() @ both)
        torch.testing.assert_close(inputs["q"].norm, both.norm(dim=0))
        model(first, apart=True)
    third = torch.cat([both, first + 1.0])
    torch.testing.assert_close(inputs["k"].total, third.t() @ third)
    for name in ("q", "v"):
        expected = torch.cat([both, first])
        torch.testing.assert_close(inputs[name].total, expected.t() @ expected)
        assert inputs[name].num_tokens == 15


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_was_changed_in_place_is_another_input(mode):
    model = Projections()
    with mode(), collect_inputs(linear_layers(model), squares) as inputs:
        x = torch.ones(2, 6)
        model.q(x)
        model.k(x.mul_(3.0))
    assert inputs["q"].total.tolist() == [2.0] * 6
    assert inputs["k"].total.tolist() == [18.0] * 6


@pytest.mark.hf
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_only_targets_are_pruned_and_exactly(family, method, dtype):
    model, blocks = tiny(family)
    model.to(dtype)
    before = copy.deepcopy(model.state_dict())
    report = prune_(model, method=method, sparsity=0.55, calibration=tokens())
    pruned = {name: matrix(layer) for name, layer in linear_layers(model).items()}
    del pruned["lm_head"]
    assert [layer.name for layer in report.layers] == list(pruned)
    for layer in report.layers:
        weight = pruned[layer.name]
        assert layer.shape == tuple(weight.shape)
        zeros = num_pruned(0.55, weight.shape[1])
        assert ((weight == 0).sum(dim=1) == zeros).all()
        assert layer.sparsity == pytest.approx(zeros / weight.shape[1])
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        kept = (
            tensor != 0 if name.removesuffix(".weight") in pruned else torch.ones_like(tensor) > 0
        )
        assert torch.equal(tensor[kept], before[name][kept]), name
    assert len(pruned) == len(linear_layers(blocks))


@pytest.mark.hf
def test_pruning_is_deterministic():
    model, _ = tiny("llama")
    twin = copy.deepcopy(model)
    prune_(model, sparsity=0.5, calibration=tokens())
    prune_(twin, sparsity=0.5, calibration=tokens())
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


@pytest.mark.hf
def test_calibration_may_be_rows_tensors_or_strings():
    model, _ = tiny("llama")
    models = [copy.deepcopy(model) for _ in range(4)]
    rows = tokens(3, 12)
    prune_(models[0], sparsity=0.5, calibration=rows)
    prune_(models[1], sparsity=0.5, calibration=[rows[0], rows[1:2].int(), rows[2]])
    # longer and more numerous, but cut to the same
    texts = ["".join(map(chr, row.tolist() + [1, 2])) for row in [*rows, rows[0]]]
    prune_(
        models[2],
        sparsity=0.5,
        calibration=(text for text in texts),
        tokenizer=lambda text: {"input_ids": list(map(ord, text))},
        nsamples=3,
        seqlen=12,
    )
    prune_(models[3], sparsity=0.5, calibration=rows[:1])
    states = [model.state_dict() for model in models]
    assert all(map(torch.equal, states[0].values(), states[1].values()))
    assert all(map(torch.equal, states[0].values(), states[2].values()))
    assert not all(map(torch.equal, states[0].values(), states[3].values()))


def test_a_seed_draws_the_samples():
    rows = tokens(20, 12)
    models = {key: Stack() for key in ("front", "first 3", "seed 0", "again", "seed 1", "all")}
    for model in models.values():
        model.load_state_dict(models["front"].state_dict())
    endless = itertools.cycle(rows)  # without a seed, no more is read than is used
    prune_(models["front"], sparsity=0.5, calibration=endless, nsamples=3)
    prune_(models["first 3"], sparsity=0.5, calibration=rows[:3])
    prune_(models["seed 0"], sparsity=0.5, calibration=rows, nsamples=3, seed=0)
    prune_(models["again"], sparsity=0.5, calibration=iter(rows), nsamples=3, seed=0)
    prune_(models["seed 1"], sparsity=0.5, calibration=rows, nsamples=3, seed=1)
    report = prune_(models["all"], sparsity=0.5, calibration=rows, nsamples=99, seed=1)
    assert report.num_samples == 20

    def same(one, other):
        states = (models[name].state_dict().values() for name in (one, other))
        return all(map(torch.equal, *states))

    assert same("front", "first 3") and same("seed 0", "again")
    assert not same("seed 0", "front") and not same("seed 0", "seed 1")


@pytest.mark.hf
def test_modes_and_hooks_are_left_as_they_were():
    model, blocks = tiny("llama")
    model.train()
    blocks[1].eval()
    modes = [module.training for module in model.modules()]
    prune_(model, sparsity=0.5, calibration=tokens())
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="calibration inputs of model.layers.0.* are not finite"):
        prune_(model, sparsity=0.5, calibration=tokens())
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.hf
def test_layers_outside_the_stack_are_pruned_last():
    model, blocks = tiny("llama")
    expected = copy.deepcopy(model)
    groups = [linear_layers(block).values() for block in expected.model.layers]
    prune_the_slow_way(expected, [*groups, [expected.lm_head]], tokens(), 0.5)
    report = prune_(model, sparsity=0.5, calibration=tokens(), ignore=())
    assert [layer.name for layer in report.layers if not layer.sequential] == ["lm_head"]
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


class Block(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x, *, scale=1.0):
        return (x + self.down(torch.relu(self.up(x))) * scale,)


class Stack(nn.Module):
    """A model that is no transformer of a known family; ``order`` is how its blocks are called."""

    def __init__(self, order=(0, 1, 2), between=lambda x: x):
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.order = order
        self.between = between

    def forward(self, ids):
        x = self.embed(ids)
        for index in self.order:
            (x,) = self.blocks[index](x, scale=1.0 + index)
            x = self.between(x)
        return x


def test_blocks_may_return_tuples_and_take_their_own_keywords():
    model = Stack()
    expected = copy.deepcopy(model)
    groups = [linear_layers(block).values() for block in expected.blocks]
    prune_the_slow_way(expected, groups, tokens(), 0.5)
    report = prune_(model, sparsity=0.5, calibration=tokens())
    assert all(layer.sequential for layer in report.layers)
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize(
    "model",
    [Stack(order=(0, 1, 2, 1)), Stack(order=(2, 1, 0)), Stack(between=lambda x: x * 2)],
    ids=["called twice", "other order", "changed in between"],
)
def test_blocks_that_do_not_feed_one_another_are_calibrated_in_one_pass(model, caplog):
    expected = copy.deepcopy(model)
    prune_the_slow_way(expected, [linear_layers(expected).values()], tokens(), 0.5)
    with caplog.at_level(logging.WARNING, "flash_llm"):
        report = prune_(model, sparsity=0.5, calibration=tokens())
    assert "do not feed one another" in caplog.text
    assert not any(layer.sequential for layer in report.layers)
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize("called", ["never", "with no tokens"])
def test_a_layer_that_no_token_reaches_is_pruned_by_magnitude(called, caplog):
    model = Stack()
    model.unused = nn.Linear(8, 8)
    if called == "with no tokens":  # as mixtures of experts call an expert that was not chosen
        model.between = lambda x: (model.unused(x[:0]), x)[1]
    expected = model.unused.weight * magnitude_mask(model.unused.weight, 0.5)
    with caplog.at_level(logging.WARNING, "flash_llm"):
        report = prune_(model, sparsity=0.5, calibration=tokens())
    assert "no calibration token reached unused" in caplog.text
    assert report.layers[-1].name == "unused" and report.layers[-1].num_tokens == 0
    assert torch.equal(model.unused.weight, expected)


class Mixed(nn.Module):
    """A block in a way of working of its own: in place, by side effects, with a cache."""

    def __init__(self, way):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.way = way

    def change(self, x):
        return self.down(torch.relu(self.up(x)))

    def forward(self, x, state=None):
        if self.way == "added in place":
            x += self.change(x)
        elif self.way == "added through .data":
            x.data.add_(self.change(x))
        elif self.way == "normalised before":
            x.div_(1.0 + x.abs().amax())
            x = x + self.change(x)
        elif self.way == "a view changed":
            x[..., :4] += self.change(x)[..., :4]
        elif self.way == "nothing returned":
            x.add_(self.change(x))
            return None
        elif self.way == "two streams":
            x, state = x + self.change(state), state.add_(self.change(x))
            return x, state
        elif self.way == "a stream beside":  # changed and not returned
            state += self.change(x)
            x = x + self.change(state)
        elif self.way in ("list of states", "dict of states", "own cache", "shared cache"):
            seen = self.up(x)
            x = x + self.down(torch.relu(state.update_(seen)))
        return x


class OwnCache:
    """A key/value cache of nobody's family: all tokens that came by, per place where it is used."""

    def __init__(self):
        self.seen = None

    def update_(self, seen):
        self.seen = seen if self.seen is None else torch.cat([self.seen, seen], dim=1)
        return self.seen.mean(dim=1, keepdim=True) + seen


class SlotCache:
    """The same, without a __dict__."""

    __slots__ = ("seen",)

    def __init__(self):
        self.seen = None

    update_ = OwnCache.update_


class ListCache(list):
    def update_(self, seen):
        self.append(seen)
        return sum(each.mean(dim=(1, 2), keepdim=True) for each in self) + seen


class DictCache(dict):
    def update_(self, seen):
        self[len(self)] = seen
        return sum(each.mean(dim=(1, 2), keepdim=True) for each in self.values()) + seen


STATES = {
    "list of states": ListCache,
    "dict of states": DictCache,
    "shared cache": OwnCache,
    "own cache": SlotCache,
}


class MixedStack(nn.Module):
    """Blocks that feed one another in all but the plain way."""

    def __init__(self, way):
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.blocks = nn.ModuleList(Mixed(way) for _ in range(3))
        self.way = way

    def forward(self, ids):
        x = self.embed(ids)
        if self.way == "two streams":
            state = x + 1.0
            for block in self.blocks:
                x, state = block(x, state)
            return x + state
        state = x + 1.0 if self.way == "a stream beside" else None
        if self.way in STATES:
            state = STATES[self.way]()
        for block in self.blocks:
            if self.way == "own cache":
                state = SlotCache()
            result = block(x, state)
            x = x if self.way == "nothing returned" else result
        return x


WAYS = ["added in place", "added through .data", "normalised before", "a view changed"]
WAYS += ["nothing returned", "two streams", "a stream beside", *STATES]


@pytest.mark.parametrize("device", [None, "cpu:0"], ids=["at home", "on another device"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_block_changes_in_place_is_as_it_was_when_the_block_is_run_again(
    way, method, device
):
    model = MixedStack(way)
    expected = copy.deepcopy(model)
    groups = [linear_layers(block).values() for block in expected.blocks]
    if method == "wanda":
        prune_the_slow_way(expected, groups, tokens(), 0.5)
    else:
        errors = reconstruct_the_slow_way(expected, groups, tokens(), METHODS[method].function)
    report = prune_(model, method=method, sparsity=0.5, calibration=tokens(), device=device)
    assert all(layer.sequential for layer in report.layers)
    if method == "wanda":
        assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    else:
        assert [layer.error for layer in report.layers] == pytest.approx(errors, rel=0.05)


class ChangedBetween(Stack):
    """The model itself changes in place what a block put out, or an argument that blocks share."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, ids):
        x, scale = self.embed(ids), torch.ones(())
        for block in self.blocks:
            (x,) = block(x, scale=scale)
            if self.what == "output":
                x.mul_(2.0)
            elif self.what == "output through .data":
                x.data.mul_(2.0)
            else:
                scale += 1.0
        return x


@pytest.mark.parametrize("what", ["output", "output through .data", "shared argument"])
def test_what_a_model_changes_in_place_between_blocks_is_not_missed(what):
    model = ChangedBetween(what)
    expected = copy.deepcopy(model)
    groups = [linear_layers(block).values() for block in expected.blocks]
    if what != "shared argument":  # an output that is changed is calibrated in one pass
        groups = [linear_layers(expected).values()]
    prune_the_slow_way(expected, groups, tokens(), 0.5)
    prune_(model, sparsity=0.5, calibration=tokens())
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


def test_recorded_calls_share_what_the_blocks_share():
    class Masked(Stack):
        def forward(self, ids):
            x, mask = self.embed(ids), torch.ones(16, 1)
            for block in self.blocks:
                (x,) = block(x, scale=mask)
            return x

    model = Masked()
    stacks = find_stacks(model, linear_layers(model))
    with calibration_mode(model):
        record_calls(model, stacks, [row[None] for row in tokens()])
    masks = [call.kwargs["scale"] for calls in stacks[0].calls for call in calls]
    assert len(masks) == 12 and len({mask.data_ptr() for mask in masks}) == 4


class Wrapper(nn.Module):
    """Calls the model inside without a word about its cache, or asks for one."""

    def __init__(self, inner, **options):
        super().__init__()
        self.inner = inner
        self.options = options

    def forward(self, ids):
        return self.inner(ids, **self.options).logits


class Passing(Wrapper):
    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


WRAPPERS = {
    "wrapper": Wrapper,
    "wrapper of a wrapper": lambda model: Passing(Wrapper(model)),
    "wrapper that asks for a cache": lambda model: Wrapper(model, use_cache=True),
    "keywords only": Passing,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "wrapper of compiled": lambda model: Wrapper(torch.compile(model, backend="eager")),
}


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_blocks(model):
    for stack in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for index, block in enumerate(stack):
            stack[index] = torch.compile(block, backend="eager")
    return model


WRAPPERS |= {"compiled in place": compiled_in_place, "blocks compiled": compiled_blocks}


# gpt2 hands the cache to its blocks in another way; what wraps the model does not matter to that.
@pytest.mark.hf
@pytest.mark.parametrize(
    ("family", "wrap"),
    [*(("llama", name) for name in WRAPPERS), ("gpt2", "wrapper that asks for a cache")],
)
def test_no_cache_of_an_earlier_call_reaches_a_layer(family, wrap):
    inner, _ = tiny(family)
    expected, configs = copy.deepcopy(inner), copy.deepcopy(inner.config)
    options = {"sparsity": 0.6, "calibration": tokens(), "targets": "re:.*(proj|c_attn|c_fc)"}
    prune_(expected, **options)
    model = WRAPPERS[wrap](inner)
    with torch.no_grad():
        model(tokens())  # what is compiled is so by now
    report = prune_(model, **options)
    assert all(layer.sequential for layer in report.layers)
    found = [layer.weight for layer in linear_layers(model).values()]
    assert all(
        map(torch.equal, found, [layer.weight for layer in linear_layers(expected).values()])
    )
    assert inner.config.to_dict() == configs.to_dict()


@pytest.mark.hf
def test_a_model_with_adapters_is_pruned_as_without():
    peft = pytest.importorskip("peft")
    model, _ = tiny("llama")
    expected = copy.deepcopy(model)
    options = {"sparsity": 0.6, "calibration": tokens(), "ignore": ("lm_head", "re:.*lora_.*")}
    prune_(expected, sparsity=0.6, calibration=tokens())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    report = prune_(adapted, **options)
    assert len(report.layers) == 21 and all(layer.sequential for layer in report.layers)
    for layer in report.layers:
        name = layer.name.removeprefix("base_model.model.").removesuffix(".base_layer")
        assert torch.equal(
            adapted.get_submodule(layer.name).weight, expected.get_submodule(name).weight
        )


class MovingBlock(Block):
    """Notes where it is sent, and that what it is called with is there too."""

    sent = []

    def to(self, device):
        MovingBlock.sent.append((id(self), str(device)))
        return super().to(device)

    def forward(self, x, *, scale=1.0):
        assert MovingBlock.sent[-1] == (id(self), "cpu:0")
        return super().forward(x, scale=scale)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["chained", "one pass"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("allocation", ["uniform", "owl", "sensitivity"])
def test_one_block_at_a_time_is_on_the_compute_device(order, method, allocation):
    model = Stack(order=order)
    expected = copy.deepcopy(model)
    model.blocks = nn.ModuleList(MovingBlock() for _ in range(3))
    model.load_state_dict(expected.state_dict())
    MovingBlock.sent.clear()
    options = {"method": method, "sparsity": 0.5, "allocation": allocation, "seqlen": 16}
    prune_(expected, calibration=tokens(), **options)
    # To torch another name of the same device, to the driver another device than home.
    prune_(model, calibration=tokens(), device="cpu:0", **options)
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    assert MovingBlock.sent
    pairs = zip(MovingBlock.sent[::2], MovingBlock.sent[1::2], strict=True)
    for (block, there), (same, back) in pairs:
        assert (block, there, back) == (same, "cpu:0", "cpu")


@pytest.mark.gpu
@pytest.mark.hf
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm"])
def test_a_model_on_the_host_is_pruned_on_the_gpu(method):
    model, _ = tiny("llama")
    expected = copy.deepcopy(model)
    options = {"method": method, "sparsity": 0.5, "calibration": tokens(), "seqlen": 16}
    report = prune_(model, device="cuda", **options)
    assert all(p.device.type == "cpu" for p in model.parameters())
    on_host = prune_(expected, **options)
    found = [layer.error or 0.0 for layer in report.layers]
    assert found == pytest.approx([layer.error or 0.0 for layer in on_host.layers], rel=0.1)
    first, other = (next(iter(linear_layers(m).values())) for m in (model, expected))
    assert ((first.weight == 0) == (other.weight == 0)).float().mean() > 0.99


def test_n_of_m_scope():
    model = Stack()
    report = prune_(model, scope="2:4", calibration=tokens())
    assert report.sparsity == 0.5
    for layer in linear_layers(model).values():
        assert ((layer.weight.view(-1, 4) == 0).sum(dim=1) == 2).all()


def test_global_scope_has_one_threshold_for_all_layers():
    model = Stack()
    model.blocks[0].up.weight.data *= 0.01
    largest = torch.cat([layer.weight.flatten() for layer in linear_layers(model).values()])
    expected = magnitude_mask(largest.detach()[None], 0.6)[0]
    report = prune_(model, method="magnitude", sparsity=0.6, scope="global")
    kept = torch.cat([layer.weight.flatten() != 0 for layer in linear_layers(model).values()])
    assert torch.equal(kept, expected)
    assert report.layers[0].sparsity > 0.99 and report.sparsity == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm"])
def test_owl_prunes_blocks_with_outliers_less(method):
    model = Stack()
    model.lone = nn.Linear(8, 8)  # outside the stack, and reached by no token
    with torch.no_grad():
        model.blocks[1].up.weight[:, :2] *= 50.0
    dense = copy.deepcopy(model)
    report = prune_(model, method=method, sparsity=0.5, allocation="owl", calibration=tokens())

    layers, seen = linear_layers(dense), {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for sample in tokens():
            dense(sample[None])
    ratios, sizes = [], []
    for index in range(3):
        names = [f"blocks.{index}.{name}" for name in ("up", "down")]
        weights = [layers[name].weight for name in names]
        norms = [torch.cat(seen[name]).norm(dim=0) for name in names]
        ratios.append(outlier_ratio(weights, norms))
        sizes.append(sum(weight.numel() for weight in weights))
    expected = owl_sparsities(ratios, sizes, 0.5)
    assert expected[1] == min(expected) == pytest.approx(0.42)
    for layer in report.layers:
        if layer.name == "lone":
            assert layer.sparsity == 0.5
        else:
            target = expected[int(layer.name.split(".")[1])]
            assert layer.sparsity == num_pruned(target, layer.shape[1]) / layer.shape[1]
    assert report.recipe.allocation == "owl"


def test_an_allocation_may_be_a_dict_of_patterns():
    model = Stack()
    allocation = {"blocks.1.up": 0.75, "re:.*up": 0.25, "_default": 0.5}
    report = prune_(model, allocation=allocation, calibration=tokens())
    found = {layer.name: layer.sparsity for layer in report.layers}
    assert found["blocks.1.up"] == 0.75  # the first that matches
    assert found["blocks.0.up"] == found["blocks.2.up"] == 0.25
    assert {found[f"blocks.{index}.down"] for index in range(3)} == {0.5}
    assert json.loads(report.to_json())["recipe"]["allocation"] == allocation

    twin = Stack()
    report = prune_(twin, sparsity=0.5, allocation={"blocks.1": 0.75}, calibration=tokens())
    assert [layer.sparsity for layer in report.layers] == [0.5, 0.5, 0.75, 0.75, 0.5, 0.5]
    report = prune_(Stack(), method="magnitude", allocation={"Linear": 0.25})
    assert report.sparsity == 0.25


def spoiled(value):
    model = Stack()
    model.blocks[1].up.weight.data[2, 3] = value
    return model


@pytest.mark.parametrize("statistic", [None, squares, gram])
def test_a_method_is_one_function_and_its_row(monkeypatch, statistic):
    seen = []

    def first_columns_mask(weight, *arguments):
        *of_inputs, sparsity, scope = arguments
        seen.append([list(found.shape) for found in of_inputs])
        return (torch.arange(weight.shape[1]) >= sparsity * weight.shape[1]).expand_as(weight)

    monkeypatch.setitem(METHODS, "first", Method(first_columns_mask, statistic))
    model = Stack()
    expected = copy.deepcopy(model)
    report = prune_(model, method="first", sparsity=0.5, calibration=tokens())
    assert report.recipe.method == "first" and report.sparsity == 0.5
    assert report.num_samples == (0 if statistic is None else len(tokens()))
    for name, layer in linear_layers(model).items():
        half = layer.weight.shape[1] // 2
        assert not layer.weight[:, :half].any()
        assert torch.equal(layer.weight[:, half:], expected.get_submodule(name).weight[:, half:])
    shapes = {None: [], squares: [[8]], gram: [[8, 8]]}
    assert shapes[statistic] in seen and len({len(found) for found in seen}) == 1
    assert flash_llm.sensitivity(expected, tokens(), (0.5,), method="first").layers[0].errors


@pytest.mark.parametrize(("statistic", "updates"), [(None, True), (squares, True), (len, False)])
def test_a_method_with_a_statistic_that_the_drivers_cannot_use_is_refused(statistic, updates):
    with pytest.raises(ValueError, match="statistic of magnitude_mask"):
        Method(magnitude_mask, statistic, updates_weights=updates)


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.updates_weights])
def test_damping_is_raised_where_rounding_leaves_the_hessian_singular(method, caplog):
    model = Stack()
    rows = torch.zeros(1, 2, dtype=torch.int64)  # one distinct token for eight channels
    with caplog.at_level(logging.WARNING, "flash_llm"):
        prune_(copy.deepcopy(model), method=method, sparsity=0.5, calibration=rows, seqlen=2)
        assert not caplog.text
        report = prune_(
            copy.deepcopy(model), method=method, sparsity=0.5, calibration=rows, damping=1e-9
        )
    assert "blocks.0.up: hessian must be positive definite after a damping of 1e-09" in caplog.text
    assert "now with a damping of 1e-08" in caplog.text
    assert report.sparsity == 0.5 and all(layer.error < 1 for layer in report.layers)
    with pytest.raises(ValueError, match=r"blocks\.0\.up: hessian must be positive definite"):
        prune_(model, method=method, sparsity=0.5, calibration=rows, damping=0.0)


def test_new_weights_that_overflow_name_the_layer():
    model = Stack().half()
    with torch.no_grad():
        model.embed.weight.copy_(torch.rand(61, 1).mul(1e-3).expand(61, 8))  # all inputs equal
        model.blocks[0].up.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"weights of blocks\.0\.up overflow torch.float16"):
        prune_(model, method="admm", sparsity=0.5, calibration=tokens())
    assert (model.blocks[0].up.weight == 6e4).all()


def tied():
    model = Stack()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return model


def packed():
    model = Stack().bfloat16()
    up = nn.Linear(8, 16).bfloat16()
    model.blocks[0].up = flash_llm.SparseLinear.from_linear(up)
    return model


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"method": "obs"},
            ValueError,
            "method must be one of magnitude, wanda, sparsegpt, admm, got 'obs'",
        ),
        (
            {"allocation": "best"},
            ValueError,
            "allocation must be one of uniform, owl, sensitivity or a dict",
        ),
        ({"allocation": 0.5}, TypeError, "allocation must be a string or a dict, got float"),
        ({"allocation": {"nothing": 0.5}}, ValueError, '"nothing" must match a linear layer'),
        (
            {"allocation": {"blocks.0": 0.5}, "ignore": ["blocks.0"]},
            ValueError,
            'allocation "blocks.0" matches no layer that is to be pruned',
        ),
        ({"allocation": {"up": 1.5}}, ValueError, "sparsity must lie in"),
        ({"allocation": {"_default": 0.5}}, ValueError, "are the same; give one"),
        ({"allocation": {"up": 0.5}, "sparsity": None}, ValueError, "matches blocks.0.down"),
        ({"allocation": "owl", "sparsity": None}, ValueError, "sparsity must be given"),
        ({"allocation": "owl", "scope": "2:4"}, ValueError, "allocation must be uniform"),
        (
            {"allocation": "owl", "method": "magnitude", "calibration": None},
            ValueError,
            "calibration text is needed",
        ),
        ({"scope": "global"}, ValueError, "is for magnitude, got method wanda"),
        ({"damping": -1.0}, ValueError, "damping must be finite and at least 0, got -1.0"),
        ({"model": spoiled(math.nan)}, ValueError, "blocks.1.up.weight must be finite"),
        ({"model": spoiled(math.inf)}, ValueError, "blocks.1.up.weight must be finite"),
        ({"sparsity": 1.1}, ValueError, "sparsity must lie in"),
        ({"sparsity": None}, ValueError, "sparsity must be given"),
        ({"scope": "tile"}, ValueError, "scope must be"),
        ({"calibration": None}, ValueError, "calibration text is needed"),
        ({"calibration": []}, ValueError, "holds no tokens"),
        ({"calibration": torch.empty(2, 0, dtype=torch.int64)}, ValueError, "holds no tokens"),
        ({"calibration": torch.rand(2, 8)}, TypeError, "must be int32 or int64, got torch.float32"),
        ({"calibration": torch.ones(1, 2, 3).long()[None]}, ValueError, r"\[L\] or \[B, L\]"),
        ({"calibration": "some text"}, ValueError, "must end in .txt or .jsonl, got .some text."),
        ({"calibration": ["some text"]}, ValueError, "need a tokenizer"),
        ({"calibration": 7}, TypeError, "a file.s name, token tensors or strings, got int"),
        ({"calibration": [[1, 2]]}, TypeError, "got list"),
        ({"nsamples": 0}, ValueError, "nsamples must be at least 1"),
        ({"seqlen": 0}, ValueError, "seqlen must be at least 1"),
        ({"targets": ["nothing"]}, ValueError, "nothing"),
        ({"ignore": ["re:nothing"]}, ValueError, "nothing"),
        ({"model": tied(), "ignore": ()}, ValueError, "tied to blocks.1.up.weight"),
        ({"model": packed()}, TypeError, "blocks.0.up is packed already"),
        ({"model": Stack().to("meta")}, ValueError, "on the meta device"),
    ],
)
def test_prune_refuses_before_it_touches_a_weight(arguments, error, message):
    arguments = {"model": Stack(), "sparsity": 0.5, "calibration": tokens(), **arguments}
    before = copy.deepcopy(arguments["model"].state_dict())
    with pytest.raises(error, match=message):
        prune_(**arguments)
    for name, tensor in arguments["model"].state_dict().items():
        assert tensor.is_meta or torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0))


@pytest.mark.hf
def test_token_ids_outside_the_vocabulary_are_refused():
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match=r"must lie in \[0, 61\).* got 0 to 61"):
        prune_(model, sparsity=0.5, calibration=[torch.tensor([0, 61])])


def test_report_reads_as_table_and_as_json():
    report = prune_(Stack(), sparsity=0.75, calibration=tokens())
    lines = str(report).splitlines()
    assert len(lines) == 1 + 6 + 1
    assert lines[1].split() == ["blocks.0.up", "16x8", "0.7500", "64", "pruned", "-"]
    assert "6 layers pruned by wanda to sparsity 0.7500 (4 calibration samples)" in lines[-1]
    decoded = json.loads(report.to_json())
    assert decoded["sparsity"] == 0.75 and decoded["layers"][0]["shape"] == [16, 8]


def test_progress_goes_through_the_callers_bar():
    seen = []

    def bar(items, description):
        seen.append((len(items), description))
        return items

    prune_(Stack(), sparsity=0.5, calibration=tokens(), progress=bar)
    prune_(Stack(), method="magnitude", sparsity=0.5, progress=bar)
    assert seen == [(4, "recording calls"), (3, "pruning"), (6, "pruning")]


def encoder_decoder():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        **{"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    model = transformers.T5ForConditionalGeneration(config)
    decoded = tokens(4, 7).flip(0)
    samples = [
        {"input_ids": ids[None], "decoder_input_ids": target[None]}
        for ids, target in zip(tokens(), decoded, strict=True)
    ]
    return model, [*model.encoder.block, *model.decoder.block], samples


def speech():
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        **{"vocab_size": 61, "d_model": 16, "num_mel_bins": 8, "pad_token_id": 0},
        **{"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
        **{"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32},
        **{"max_source_positions": 20, "max_target_positions": 20},
        **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    )
    model = transformers.WhisperForConditionalGeneration(config)
    samples = [
        {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": ids[None]}
        for ids in tokens(4, 6)
    ]
    return model, [*model.model.encoder.layers, *model.model.decoder.layers], samples


def pictures():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
    )
    model = transformers.ViTForImageClassification(config)
    return model, list(model.vit.layers), [{"pixel_values": torch.randn(2, 3, 16, 16)}] * 3


@pytest.mark.hf
@pytest.mark.parametrize("make", [encoder_decoder, speech, pictures])
def test_dicts_of_arguments_calibrate_models_that_take_more_than_text(make):
    torch.manual_seed(0)
    model, blocks, samples = make()
    expected = copy.deepcopy(model)
    names = [name for name, module in model.named_modules() if module in blocks]

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = expected

        def forward(self, index):
            return self.inner(**samples[index])

    # Each block, the decoder's too, sees what the pruned blocks before it put out.
    groups = [linear_layers(expected.get_submodule(name)).values() for name in names]
    prune_the_slow_way(Called(), groups, torch.arange(len(samples)), 0.5)
    targets = [f"re:.*{name}\\..*" for name in names]
    report = prune_(model, sparsity=0.5, calibration=samples, targets=targets)
    assert all(layer.sequential for layer in report.layers)
    assert report.num_tokens == (64 if make is encoder_decoder else 0)
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


@pytest.mark.hf
def test_text_is_input_and_labels_of_an_encoder_decoder():
    model, _, _ = encoder_decoder()
    expected = copy.deepcopy(model)
    pairs = [{"input_ids": ids[None], "labels": ids[None]} for ids in tokens()]
    prune_(expected, sparsity=0.5, calibration=pairs)
    padded = {"input_ids": torch.nn.functional.pad(tokens(), (0, 3))}
    padded["attention_mask"] = torch.nn.functional.pad(torch.ones(4, 16), (0, 3))
    for calibration in (tokens(), padded):
        twin = copy.deepcopy(model)
        prune_(twin, sparsity=0.5, calibration=calibration)
        assert all(map(torch.equal, twin.state_dict().values(), expected.state_dict().values()))


@pytest.mark.hf
@pytest.mark.parametrize("make", [speech, pictures])
@pytest.mark.parametrize("calibration", ["text.txt", ["a text"], tokens(), list(tokens())])
def test_text_is_refused_for_a_model_that_takes_none(make, calibration):
    model, _, _ = make()
    with pytest.raises(TypeError, match="is called with (input_features|pixel_values)"):
        prune_(model, sparsity=0.5, calibration=calibration, targets="re:.*fc1")


@pytest.mark.hf
def test_floating_point_arguments_beside_text_are_passed_on():
    model, _ = tiny("llama")
    expected = copy.deepcopy(model)
    samples = [{"inputs_embeds": model.model.embed_tokens(row[None]).detach()} for row in tokens()]
    prune_(expected, sparsity=0.5, calibration=tokens())
    prune_(model, sparsity=0.5, calibration=samples)
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    with pytest.raises(TypeError, match="must hold tensors, pixel_values is list"):
        prune_(pictures()[0], sparsity=0.5, calibration={"pixel_values": [[0.5]]})
