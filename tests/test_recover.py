"""Recovery: it lowers what it says it lowers, keeps the zeros, and never ends worse."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from test_prune import Block, Stack, linear_layers, packed, tiny, tokens
from torch import nn

from flash_llm import prune_, recover_


def pruned(dense, method="wanda", sparsity=0.6):
    model = copy.deepcopy(dense)
    prune_(model, method=method, sparsity=sparsity, calibration=tokens(), seqlen=16)
    return model


def outputs_of_blocks(model, blocks):
    """Each block's hidden states over all samples, from passes of the whole model."""
    seen = [[] for _ in blocks]
    handles = [
        block.register_forward_hook(
            lambda _, args, output, seen=seen[i]: seen.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for i, block in enumerate(blocks)
    ]
    with torch.no_grad():
        for sample in tokens():
            model.eval()(sample[None])
    for handle in handles:
        handle.remove()
    return [torch.cat(tensors).double() for tensors in seen]


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.hf
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_errors_are_those_of_the_whole_model_and_fall(family):
    dense, dense_blocks = tiny(family)
    model = pruned(dense)
    untrained = copy.deepcopy(model)
    base = model.base_model_prefix
    stack = "h" if family == "gpt2" else "layers"
    report = recover_(model, dense, calibration=tokens(), seqlen=16, epochs=6, learning_rate=3e-3)
    wanted = outputs_of_blocks(dense, dense_blocks)
    before = outputs_of_blocks(untrained, getattr(getattr(untrained, base), stack))
    after = outputs_of_blocks(model, getattr(getattr(model, base), stack))
    assert [block.name for block in report.blocks] == [f"{base}.{stack}.{i}" for i in range(3)]
    # The first block has the same inputs in all three models; later ones have recovered inputs.
    assert report.blocks[0].before == pytest.approx(relative(before[0], wanted[0]), rel=1e-4)
    for i, block in enumerate(report.blocks):
        assert block.after == pytest.approx(relative(after[i], wanted[i]), rel=1e-4)
        assert block.after < block.before
        assert block.after < 0.9 * relative(before[i], wanted[i])


@pytest.mark.hf
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zeros_stay_zeros_and_all_else_outside_the_blocks_stays(dtype):
    dense = tiny("llama")[0].to(dtype)
    model = pruned(dense, "sparsegpt")
    before = copy.deepcopy(model.state_dict())
    recover_(model, dense, calibration=tokens(), seqlen=16, epochs=3, learning_rate=3e-3)
    moved = 0
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        if "layers" not in name:
            assert torch.equal(tensor, before[name])
        elif "proj" in name:
            assert torch.equal(tensor == 0, before[name] == 0)
            moved += not torch.equal(tensor, before[name])
    assert moved == 21
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.hf
def test_it_is_deterministic_and_the_seed_counts():
    dense = tiny("llama")[0]
    model = pruned(dense)
    models = [copy.deepcopy(model) for _ in range(3)]
    for twin, seed in zip(models, (0, 0, 1), strict=True):
        options = {"seed": seed, "epochs": 2, "learning_rate": 1e-3}
        recover_(twin, dense, calibration=tokens(), seqlen=16, **options)
    states = [list(twin.state_dict().values()) for twin in models]
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[0], states[2]))


def test_a_linear_block_finds_the_least_squares():
    """One output, one weight that stays: the best is known in closed form."""

    class Lone(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(2, 1, bias=False)

        def forward(self, x):
            return self.up(x)

    model = nn.Module()
    model.embed = nn.Embedding(3, 2)
    model.blocks = nn.ModuleList([Lone()])
    model.forward = lambda ids: model.blocks[0](model.embed(ids))
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0], [-2.0, 0.5]])
    model.embed.weight.data = x.clone()
    dense = copy.deepcopy(model)
    dense.blocks[0].up.weight.data = torch.tensor([[3.0, 4.0]])
    model.blocks[0].up.weight.data = torch.tensor([[0.0, 3.5]])
    best = (x[:, 1] @ (x @ torch.tensor([3.0, 4.0]))) / (x[:, 1] @ x[:, 1])
    report = recover_(
        model, dense, calibration=torch.tensor([[0, 1, 2]]), seqlen=3, epochs=100, learning_rate=0.1
    )
    assert model.blocks[0].up.weight[0, 0] == 0
    assert model.blocks[0].up.weight[0, 1].item() == pytest.approx(best.item(), abs=1e-3)
    rest = x @ torch.tensor([3.0, 4.0]) - best * x[:, 1]
    wanted = (rest.norm() / (x @ torch.tensor([3.0, 4.0])).norm()).item()
    assert report.blocks[0].after == pytest.approx(wanted, rel=1e-4)


def test_it_never_ends_worse_than_it_began():
    dense = Stack()
    model = pruned(dense)
    before = copy.deepcopy(model)
    report = recover_(model, dense, calibration=tokens(), seqlen=16, epochs=2, learning_rate=1e4)
    assert [block.epoch for block in report.blocks] == [0, 0, 0]
    assert all(block.after == block.before for block in report.blocks)
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))


def test_a_dense_model_has_nothing_to_recover():
    dense = Stack()
    model = copy.deepcopy(dense)
    report = recover_(model, dense, calibration=tokens(), seqlen=16, epochs=1)
    assert all(block.before == 0 and block.epoch == 0 for block in report.blocks)
    assert all(map(torch.equal, model.state_dict().values(), dense.state_dict().values()))


def test_dense_weights_may_come_from_a_folder(tmp_path):
    dense = Stack()
    save_file(dense.state_dict(), tmp_path / "model.safetensors")
    model = pruned(dense)
    twin = copy.deepcopy(model)
    options = {"calibration": tokens(), "seqlen": 16, "epochs": 2, "learning_rate": 1e-2}
    report = recover_(model, dense, **options)
    again = recover_(twin, tmp_path, **options)
    assert again.blocks == report.blocks
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


def test_layers_that_are_ignored_are_trained_freely():
    dense = Stack()
    model = pruned(dense)
    recover_(
        model,
        dense,
        **{"calibration": tokens(), "seqlen": 16, "epochs": 2, "learning_rate": 1e-2},
        ignore="down",
    )
    for name, layer in linear_layers(model).items():
        zeros = (layer.weight == 0).float().mean()
        assert zeros < 0.1 if name.endswith("down") else zeros >= 0.6


def test_one_block_at_a_time_is_on_the_compute_device():
    dense = Stack()
    model = pruned(dense)
    expected = copy.deepcopy(model)
    options = {"calibration": tokens(), "seqlen": 16, "epochs": 2, "learning_rate": 1e-2}
    recover_(expected, dense, **options)
    # To torch another name of the same device, to the driver another device than home.
    recover_(model, dense, **options, device="cpu:0")
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


@pytest.mark.gpu
def test_a_model_on_the_host_is_recovered_on_the_gpu():
    dense = Stack()
    model = pruned(dense)
    report = recover_(
        model, dense, calibration=tokens(), seqlen=16, epochs=4, learning_rate=1e-2, device="cuda"
    )
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert all(block.after < block.before for block in report.blocks)


def test_modes_and_hooks_are_left_as_they_were():
    dense = Stack()
    model = pruned(dense).train()
    recover_(model, dense, calibration=tokens(), seqlen=16, epochs=1)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_report_reads_as_table_and_as_json(tmp_path):
    dense = Stack()
    seen = []

    def bar(items, description):
        seen.append((len(items), description))
        return items

    report = recover_(pruned(dense), dense, calibration=tokens(), seqlen=16, epochs=2, progress=bar)
    assert seen == [(3, "recovering")]
    lines = str(report).splitlines()
    assert lines[0].split() == ["block", "before", "after", "epoch"]
    assert lines[1].split()[0] == "blocks.0" and len(lines) == 5
    stored = json.loads(report.save(tmp_path).read_text())
    assert (tmp_path / "recovery_report.json").exists()
    assert stored["blocks"][2]["before"] == report.blocks[2].before
    assert (stored["epochs"], stored["num_samples"]) == (2, 4)


def other_shape():
    dense = Stack()
    dense.blocks[1] = Block(4)
    return dense


def fewer_blocks():
    dense = Stack()
    del dense.blocks[2]
    return dense


def infinite():
    dense = Stack()
    dense.blocks[1].up.bias.data[0] = math.inf
    return dense


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be an integer of at least 1, got 0"),
        ({"epochs": 1.5}, ValueError, "epochs must be an integer"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate must be positive"),
        ({"dense": 7}, TypeError, "dense must be a module or a folder, got int"),
        ({"dense": "nowhere"}, FileNotFoundError, "nowhere"),
        (
            {"dense": other_shape()},
            ValueError,
            r"blocks.1.up.weight of dense must have the shape \[16, 8\], got \[8, 4\]",
        ),
        ({"dense": fewer_blocks()}, ValueError, "dense must have the tensor blocks.2.up.weight"),
        ({"dense": infinite()}, ValueError, "outputs of blocks.1 .* not finite"),
        ({"calibration": []}, ValueError, "holds no tokens"),
        ({"model": packed()}, TypeError, "blocks.0.up is packed already"),
        ({"model": Stack(order=(2, 1, 0))}, NotImplementedError, "those of blocks do not"),
        (
            {"model": nn.Sequential(nn.Embedding(61, 8), nn.Linear(8, 8))},
            NotImplementedError,
            "it has none",
        ),
    ],
)
def test_recover_refuses(arguments, error, message):
    arguments = {"model": Stack(), "dense": Stack(), "calibration": tokens(), **arguments}
    with pytest.raises(error, match=message):
        recover_(**arguments, seqlen=16, **({} if "epochs" in arguments else {"epochs": 1}))


@pytest.mark.hf
def test_no_cache_of_an_earlier_call_reaches_a_block():
    from test_prune import Wrapper

    dense, _ = tiny("llama")
    model = pruned(dense)
    options = {"calibration": tokens(), "epochs": 2, "ignore": ("lm_head",)}
    wrapped = Wrapper(copy.deepcopy(model))
    recover_(wrapped, Wrapper(dense), **options)
    recover_(model, dense, **options)
    assert all(map(torch.equal, model.state_dict().values(), wrapped.inner.state_dict().values()))
