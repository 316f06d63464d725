"""Tensor parallel of transformers over packed layers: two processes, on two GPUs or on the CPU."""

import copy
import json
import os
import socket

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import flash_llm
from flash_llm import SparseLinear, ops, quantize

transformers = pytest.importorskip("transformers")
distributed = pytest.importorskip("transformers.distributed")
pytestmark = [pytest.mark.hf, pytest.mark.slow]

DEVICE = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
"""transformers gives each process a GPU of its own wherever it sees one."""
IDS = torch.arange(24).view(2, 12)
KINDS = ops.STORED_VALUES[1:]


def save_models(folder):
    """Save a model, dense and packed, whose layers the plan cuts by rows and by columns.

    Returns:
        The packed models by their values.
    """
    torch.manual_seed(0)
    model = llama(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    model.save_pretrained(folder / "dense")
    packed = {}
    for values in ops.STORED_VALUES:
        packed[values] = copy.deepcopy(model)
        flash_llm.sparsify_(packed[values], values=values)
        packed[values].save_pretrained(folder / values)
    narrow = llama(hidden_size=256, intermediate_size=320, num_hidden_layers=1)
    narrow.save_pretrained(folder / "narrow")
    flash_llm.sparsify_(narrow, values="int4")
    narrow.save_pretrained(folder / "narrow int4")
    return packed


def llama(**sizes):
    config = transformers.LlamaConfig(
        vocab_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        **sizes,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval().to(DEVICE)
    with torch.no_grad():
        for layer in model.model.layers.modules():
            if isinstance(layer, nn.Linear):
                layer.weight[torch.rand_like(layer.weight) < 0.7] = 0
                nn.init.normal_(layer.bias, std=0.5)
    return model


def load(folder):
    plan = distributed.DistributedConfig(tp_plan="auto", tp_size=2)
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype="auto", distributed_config=plan)


def logits_of(model):
    return model(IDS.to(model.device)).logits.float()


def gradient(model):
    """Of the embeddings, and so through all packed layers."""
    weight = model.get_input_embeddings().weight
    logits_of(model).square().sum().backward()
    return weight.grad.full_tensor() if isinstance(weight, DTensor) else weight.grad


def worker(rank, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found = {}
    dense = load(folder / "dense")
    found["report"] = flash_llm.sparsify_(dense).to_json()
    for name, model in {"packed folder": load(folder / "16-bit"), "sparsify_": dense}.items():
        layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
        with torch.no_grad():
            found[name] = logits_of(model)
        found[f"{name} weights"] = {n: m.weight.clone() for n, m in layers.items()}
        found[f"{name} gradient"] = gradient(model)
        for save in (model.save_pretrained, lambda to, model=model: flash_llm.save(model, to)):
            with pytest.raises(NotImplementedError, match="q_proj "):
                save(folder / f"again-{rank}")
    for values in KINDS:
        dense = load(folder / "dense")
        flash_llm.sparsify_(dense, values=values)
        for way, model in {"folder": load(folder / values), "sparsify_": dense}.items():
            layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
            found[f"{values} {way} values"] = {
                n: m.packed.to_quantized() for n, m in layers.items()
            }
            with torch.no_grad():
                found[f"{values} {way}"] = logits_of(model)
    found["cut"] = cut_groups(folder)
    found["fsdp"] = fully_sharded()
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def cut_groups(folder):
    """What is said of int4 values whose groups of columns the plan cuts."""
    model, messages = load(folder / "narrow"), []
    for act in (
        lambda: flash_llm.sparsify_(model, values="int4"),
        lambda: load(folder / "narrow int4"),
    ):
        with pytest.raises(ValueError) as error:
            act()
        messages.append(str(error.value))
    assert not any(isinstance(layer, SparseLinear) for layer in model.modules())
    assert logits_of(model).isfinite().all()
    return messages


def fully_sharded():
    """What is said of weights that FSDP2 distributes."""
    mesh = torch.distributed.init_device_mesh(DEVICE, (2,))
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.ReLU()).half()
    torch.distributed.fsdp.fully_shard(model[0], mesh=mesh)
    messages = []
    for act in (flash_llm.sparsify_, lambda model: SparseLinear.from_linear(model[0][0])):
        with pytest.raises(NotImplementedError) as error:
            act(model)
        messages.append(str(error.value))
    assert type(model[0][0]) is nn.Linear
    return messages


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The packed models in one process, by their values; what each of two processes found."""
    folder = tmp_path_factory.mktemp("parallel")
    packed = save_models(folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as environment:
        if DEVICE == "cpu":  # one GPU is not enough for two processes
            environment.setenv("CUDA_VISIBLE_DEVICES", "")
        torch.multiprocessing.spawn(worker, (folder, port), nprocs=2)
    return packed, [torch.load(folder / f"{rank}.pt", map_location=DEVICE) for rank in range(2)]


@pytest.mark.parametrize("name", ["packed folder", "sparsify_"])
def test_two_processes_give_the_logits_and_gradients_of_one(name, run):
    model, ranks = run[0]["16-bit"], run[1]
    with torch.no_grad():
        expected = logits_of(model)
    expected_gradient = gradient(model)
    model.zero_grad()
    for rank in ranks:
        # Sums over processes are rounded once more to bfloat16.
        torch.testing.assert_close(rank[name], expected, rtol=0.02, atol=0.02 * expected.std())
        torch.testing.assert_close(
            *(rank[f"{name} gradient"], expected_gradient),
            rtol=0.05,
            atol=0.05 * expected_gradient.std().item(),
        )


@pytest.mark.parametrize("name", ["packed folder", "sparsify_"])
def test_each_process_holds_its_part_of_a_weight(name, run):
    model, ranks = run[0]["16-bit"], run[1]
    for layer, whole in model.named_modules():
        if not isinstance(whole, SparseLinear):
            continue
        by_row = layer.endswith(("o_proj", "down_proj"))
        for part, rank in zip(whole.weight.chunk(2, dim=int(by_row)), ranks, strict=True):
            assert torch.equal(rank[f"{name} weights"][layer], part), layer


@pytest.mark.parametrize("way", ["folder", "sparsify_"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_values_are_cut_with_their_scales(kind, way, run):
    model, ranks = run[0][kind], run[1]
    with torch.no_grad():
        expected = logits_of(model)
    for rank in ranks:
        torch.testing.assert_close(
            *(rank[f"{kind} {way}"], expected), rtol=0.02, atol=0.02 * expected.std()
        )
    for layer, whole in model.named_modules():
        if not isinstance(whole, SparseLinear):
            continue
        by_row = int(layer.endswith(("o_proj", "down_proj")))
        parts = [of_rank[f"{kind} {way} values"][layer] for of_rank in ranks]
        values, of_elements = with_scales(*whole.packed.to_quantized())
        for part, *expected in zip(
            parts, values.chunk(2, by_row), of_elements.chunk(2, by_row), strict=True
        ):
            found = with_scales(*part)
            assert torch.equal(found[0], expected[0]), layer
            stored = found[0] != 0  # zeros alone have no scale of their own
            assert torch.equal(found[1][stored], expected[1][stored]), layer


def with_scales(values, scales):
    """Values as numbers, and the scale of each of them."""
    return values.float(), quantize.scales_of_elements(scales, values.shape[1])


def test_parts_that_cut_groups_of_columns_with_one_scale_are_refused_by_name(run):
    for rank in run[1]:
        for message in rank["cut"]:
            assert "layers.0.mlp.down_proj" in message and "160 of the 320" in message


def test_the_report_of_each_process_is_that_of_the_whole_model(run):
    first, second = run[1]
    assert first["report"] == second["report"]
    rows = json.loads(first["report"])["rows"]
    assert [row["shape"] for row in rows if row["decision"] == "packed"][:2] == [
        [256, 256],
        [128, 256],
    ]


def test_weights_that_fsdp_distributes_are_refused(run):
    for rank in run[1]:
        swapped, packed = rank["fsdp"]
        assert "0.0 is distributed" in swapped and "weight of Linear is distributed" in packed
