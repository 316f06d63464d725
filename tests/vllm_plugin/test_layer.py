"""Single layers: each process's part of a weight, any leading shape, and what vLLM compiles."""

import pytest
import torch
from torch import nn

pytest.importorskip("vllm.config", reason="needs vLLM; .ci/run makes an environment for it")

import flash_llm  # noqa: E402
from flash_llm import PackedWeight, quantize, sparsify_  # noqa: E402
from flash_llm.testing import random_sparse  # noqa: E402

KINDS = flash_llm.ops.STORED_VALUES[1:]
K, HEAD, HEADS, KV_HEADS, MLP = 160, 16, 8, 2, 256
SIZES = {
    "q_proj": (HEADS * HEAD, K),
    "k_proj": (KV_HEADS * HEAD, K),
    "v_proj": (KV_HEADS * HEAD, K),
    "gate_proj": (MLP, K),
    "up_proj": (MLP, K),
    "down_proj": (K, MLP),
}
FUSED = {
    "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
    "down_proj": {"down_proj": None},
}


@pytest.fixture(scope="module", autouse=True)
def distributed():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.utils.network_utils import get_open_port

    with set_current_vllm_config(VllmConfig()):
        address = f"tcp://127.0.0.1:{get_open_port()}"
        init_distributed_environment(1, 0, address, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def weights():
    return {
        name: random_sparse(*size, 0.7, dtype=torch.bfloat16, seed=seed)
        for seed, (name, size) in enumerate(SIZES.items())
    }


def save_packed(weights, folder, **options):
    """Save layers of which all are packed but up_proj."""
    model = nn.ModuleDict()
    for name, weight in weights.items():
        model[name] = nn.Linear(*weight.T.shape, bias=False, dtype=torch.bfloat16)
        model[name].weight.data.copy_(weight)
    sparsify_(model, ignore=["up_proj"], **options)
    flash_llm.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def packed_folder(weights, tmp_path_factory):
    return save_packed(weights, tmp_path_factory.mktemp("layers"))


@pytest.fixture(scope="module")
def quantized_folders(weights, tmp_path_factory):
    return {
        kind: save_packed(weights, tmp_path_factory.mktemp(kind), values=kind) for kind in KINDS
    }


def build(name, folder=None, *, rank=0, size=1, bias=False, prefix=None, **config_options):
    """A layer of vLLM as process ``rank`` of ``size`` builds it, under its name or ``prefix``."""
    from vllm.model_executor.layers import linear

    from flash_llm.integrations.vllm.config import FlashLLMConfig

    config = FlashLLMConfig(packed_folder=folder is not None, **config_options)
    config.packed_modules_mapping = {name: list(shards) for name, shards in FUSED.items()}
    if folder is not None:
        config.maybe_update_config(str(folder))
    options = {"bias": bias, "quant_config": config, "prefix": prefix or name}
    options |= {"params_dtype": torch.bfloat16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "get_tensor_model_parallel_rank", lambda: rank)
        patch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: size)
        if name == "qkv_proj":
            return linear.QKVParallelLinear(K, HEAD, HEADS, KV_HEADS, **options)
        if name == "gate_up_proj":
            return linear.MergedColumnParallelLinear(K, [MLP, MLP], **options)
        return linear.RowParallelLinear(MLP, K, reduce_results=False, **options)


def load(layer, name, tensors):
    """Hand the tensors of a checkpoint to a layer as vLLM's models do, sorted by their names."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_processing

    for shard, shard_id in FUSED[name].items():
        for key in sorted(tensors):
            if key.rpartition(".")[0] == shard:
                parameter = getattr(layer, key.rpartition(".")[2])
                ids = [] if shard_id is None else [shard_id]
                parameter.weight_loader(parameter, tensors[key], *ids)
    finalize_layerwise_processing(layer, None)


def packed_of(layer):
    header = layer.packed_header
    cls = PackedWeight.class_for(header.format)
    return cls(header, layer.weight_offsets, layer.weight_packed)


def weight_of(layer):
    return packed_of(layer).to_dense()


def part(name, weights, rank, size):
    """The rows or columns of a process: heads that are fewer than processes are replicated."""
    if name == "down_proj":
        columns = MLP // size
        return weights[name][:, rank * columns : (rank + 1) * columns]
    parts = []
    for shard in FUSED[name]:
        whole = weights[shard]
        pieces = min(size, KV_HEADS) if shard in ("k_proj", "v_proj") else size
        rows = len(whole) // pieces
        first = rank * pieces // size * rows
        parts.append(whole[first : first + rows])
    return torch.cat(parts)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (1, 4), (5, 8)])
def test_parts_of_processes(name, rank, size, weights, packed_folder):
    from safetensors.torch import load_file

    dense = build(name, rank=rank, size=size)
    load(dense, name, {f"{key}.weight": weight for key, weight in weights.items()})
    assert torch.equal(weight_of(dense), part(name, weights, rank, size))
    packed = build(name, packed_folder, rank=rank, size=size)
    load(packed, name, load_file(packed_folder / "model.safetensors"))
    assert packed.packed_header == dense.packed_header
    assert torch.equal(packed.weight_packed, dense.weight_packed)
    assert torch.equal(packed.weight_offsets, dense.weight_offsets)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (5, 8)])
def test_quantised_values_are_cut_and_fused_with_their_scales(
    name, rank, size, kind, weights, quantized_folders
):
    from safetensors.torch import load_file

    folder = quantized_folders[kind]
    if (name, size, kind) == ("down_proj", 8, "int4"):
        with pytest.raises(ValueError, match=r"down_proj: .* 32 .*256 .*128 .*int4"):
            build(name, folder, rank=rank, size=size)
        return
    layer = build(name, folder, rank=rank, size=size)
    load(layer, name, load_file(folder / "model.safetensors"))
    rounded = {key: quantize.round_to_values(weight, kind) for key, weight in weights.items()}
    dense = {key: quantize.dequantize(*both, torch.bfloat16) for key, both in rounded.items()}
    dense["up_proj"] = weights["up_proj"]
    assert torch.equal(weight_of(layer), part(name, dense, rank, size))
    if name == "gate_up_proj":  # rounding up_proj, which is dense in the folder, would change it
        assert layer.packed_header.values == "16-bit"
        return
    values, scales = packed_of(layer).to_quantized()
    found = values.float(), quantize.scales_of_elements(scales, values.shape[1])
    expected = (
        part(name, {key: v.float() for key, (v, _) in rounded.items()}, rank, size),
        part(
            name,
            {key: quantize.scales_of_elements(s, v.shape[1]) for key, (v, s) in rounded.items()},
            *(rank, size),
        ),
    )
    assert torch.equal(found[0], expected[0])
    stored = found[0] != 0  # zeros alone have no scale of their own
    assert torch.equal(found[1][stored], expected[1][stored])


@pytest.mark.parametrize("kind", KINDS)
def test_dense_weights_are_rounded_while_they_load(kind, weights):
    tensors = {"down_proj.weight": weights["down_proj"]}
    layer = build("down_proj", rank=1, size=2, values=kind)
    load(layer, "down_proj", tensors)
    mine = part("down_proj", weights, 1, 2)
    assert packed_of(layer).values == kind
    assert torch.equal(weight_of(layer), quantize.round_to_grid(mine, kind))
    if kind == "int4":
        with pytest.raises(ValueError, match=r"down_proj: .* 64 .*256 .*128 .*int4"):
            build("down_proj", rank=1, size=4, values=kind)


@pytest.mark.parametrize("name", ["qkv_proj", "gate_up_proj"])
def test_only_inputs_of_quantised_values_are_rounded(name, quantized_folders):
    from safetensors.torch import load_file

    folder = quantized_folders["int8"]
    layer = build(name, folder, x_quantization="dynamic")
    load(layer, name, load_file(folder / "model.safetensors"))
    packed, x = packed_of(layer), torch.randn(2, K).bfloat16()
    way = "dynamic" if packed.values == "int8" else None  # gate_up_proj is int8 in part only
    with torch.inference_mode():
        assert torch.equal(layer(x)[0], flash_llm.spmm(x, packed, x_quantization=way))
    exact, rounded = (flash_llm.spmm(x, packed, x_quantization=way) for way in (None, "dynamic"))
    assert torch.equal(exact, rounded) == (way is None)


def test_packed_parts_of_a_layer_that_was_taken_for_dense(packed_folder):
    from safetensors.torch import load_file

    # Nothing says of which layers one of this name is fused.
    layer = build("gate_up_proj", packed_folder, prefix="w13")
    with pytest.raises(NotImplementedError, match="w13"):
        load(layer, "gate_up_proj", load_file(packed_folder / "model.safetensors"))


@pytest.fixture(scope="module")
def mlp(weights):
    """Two layers, of which the first has a bias."""
    tensors = {f"{name}.weight": weight for name, weight in weights.items()}
    for name in ("gate_proj", "up_proj"):
        tensors[f"{name}.bias"] = torch.randn(MLP, dtype=torch.bfloat16)
    layers = nn.ModuleDict({"up": build("gate_up_proj", bias=True), "down": build("down_proj")})
    load(layers["up"], "gate_up_proj", tensors)
    load(layers["down"], "down_proj", tensors)
    biases = [tensors["gate_proj.bias"], tensors["up_proj.bias"]]
    assert torch.equal(layers["up"].bias, torch.cat(biases))
    return layers


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 5, K), (0, K)])
def test_leading_shapes(shape, weights, mlp):
    x = torch.randn(shape, dtype=torch.bfloat16)
    with torch.inference_mode():
        y, _ = mlp["up"](x)
    expected = nn.functional.linear(x, part("gate_up_proj", weights, 0, 1), mlp["up"].bias)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_compiled_for_any_number_of_tokens(mlp):
    def block(x):
        gate, up = mlp["up"](x)[0].chunk(2, -1)
        return mlp["down"](nn.functional.silu(gate) * up)[0]

    with torch._dynamo.config.patch(disable=False), torch.inference_mode():
        compiled = torch.compile(block, fullgraph=True, dynamic=True)
        for tokens in (2, 7, 33):
            x = torch.randn(tokens, K, dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), block(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("format", "values"),
    [
        *((format, "16-bit") for format in ("bitmap", "row_bitmap", "tiled_csl")),
        *((format, kind) for format in ("row_bitmap", "quantized_bitmap") for kind in KINDS),
    ],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_layers_of_one_sparsity_share_what_compiled_code_contains(sparsity, format, values):
    from flash_llm.integrations.vllm.linear_method import interchangeable

    own, shared = set(), set()
    x = torch.randn(3, 1030).bfloat16()
    for seed in range(12):
        weight = random_sparse(520, 1030, sparsity, dtype=torch.bfloat16, seed=seed)
        packed = flash_llm.pack(weight, format, values=values)
        padded = interchangeable(packed)
        assert torch.equal(padded.to_dense(), packed.to_dense())
        assert torch.equal(flash_llm.spmm(x, padded), flash_llm.spmm(x, packed))
        assert packed.nbytes <= padded.nbytes <= 1.02 * packed.nbytes
        own.add(packed.header)
        shared.add(padded.header)
    if sparsity and format != "tiled_csl":
        assert len(own) == 12 and len(shared) <= 4
