"""Whole engines: packed and dense folders, random weights, adapters, reloading, two processes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm.config", reason="needs vLLM; .ci/run makes an environment for it")

from engines import assert_close, assert_same, engine, generate  # noqa: E402

import flash_llm  # noqa: E402
from flash_llm import PackedWeight, quantize  # noqa: E402


def layers(llm):
    """Of each linear layer: the dense weight if it is packed, else None."""

    from vllm.model_executor.layers.linear import LinearBase

    def found(model):
        modules = model.named_modules()
        return {name: unpacked(layer) for name, layer in modules if isinstance(layer, LinearBase)}

    (result,) = llm.apply_model(found)
    return result


def unpacked(layer):
    header = getattr(layer, "packed_header", None)
    if header is None:
        return None
    cls = PackedWeight.class_for(header.format)
    return cls(header, layer.weight_offsets, layer.weight_packed).to_dense()


def with_weights(folder, target, change):
    """A copy of a folder in which ``change`` has been done to the tensors of its file."""
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_packed_folder(architecture, folders, expected):
    with engine(folders[architecture] / "packed") as llm:
        assert_same(generate(llm), expected[architecture])
        weights = layers(llm)
        llm.collective_rpc("reload_weights")
        assert_same(generate(llm), expected[architecture])
    dense = load_file(folders[architecture] / "dense" / "model.safetensors")
    prefix = "model.decoder." if architecture == "opt" else "model."
    attention = f"{prefix}layers.1.self_attn."
    # k_proj is dense in the folder; the layer that it is fused into is packed.
    parts = [dense[f"{attention}{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(weights[attention + "qkv_proj"], torch.cat(parts))
    unpruned = "layers.0.fc2" if architecture == "opt" else "layers.0.mlp.down_proj"
    assert {name for name, weight in weights.items() if weight is None} == {prefix + unpruned}


def test_experts_stay_dense(folders, expected):
    folder = folders["qwen3_moe"] / "packed"
    with engine(folder) as llm:
        assert_same(generate(llm), expected["qwen3_moe"])
        packed = {name for name, weight in layers(llm).items() if weight is not None}
    # vLLM's model does not say of what the gate_up_proj of its dense block is fused.
    assert packed == {
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
        *(f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in ("qkv", "o")),
    }
    stored = load_file(folder / "model.safetensors")
    assert "model.layers.1.mlp.experts.0.up_proj.weight" in stored


@pytest.mark.parametrize(
    ("guess", "happened"),
    [
        (None, "prefix_cache_hits"),
        ({"method": "ngram", "prompt_lookup_max": 1}, "spec_decode_num_draft_tokens"),
        ({"method": "draft_model"}, "spec_decode_num_accepted_tokens"),
    ],
    ids=["chunks of prompts", "guesses from the prompt", "guesses of a draft model"],
)
def test_several_tokens_in_a_step(guess, happened, folders, expected):
    folder = str(folders["llama"] / "packed")
    options = {"enable_prefix_caching": True, "block_size": 16, "disable_log_stats": False}
    if guess is None:
        options |= {"max_num_batched_tokens": 16, "max_num_seqs": 4}
    else:
        model = {"model": folder} if guess["method"] == "draft_model" else {}
        options["speculative_config"] = {"num_speculative_tokens": 3, **guess, **model}
    with engine(folder, **options) as llm:
        for _ in range(2):
            assert_same(generate(llm), expected["llama"])
        metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics[f"vllm:{happened}"].value > 0


def test_dense_folder_with_zeros(folders, expected, tmp_path):
    changed = "model.layers.1.self_attn.o_proj"

    def negate(tensors):
        tensors[f"{changed}.weight"].neg_()

    def add_zeros(tensors):
        tensors[f"{changed}.weight"][:8] = 0

    dense = folders["llama"] / "dense"
    negated = with_weights(dense, tmp_path / "negated", negate)
    sparser = with_weights(dense, tmp_path / "sparser", add_zeros)
    with engine(dense, quantization="flash_llm") as llm:
        assert_same(generate(llm), expected["llama"])
        before = layers(llm)
        unpruned = "model.layers.0.mlp.down_proj"
        assert {name for name, weight in before.items() if weight is None} == {unpruned}
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(negated)})
        after = layers(llm)
        assert torch.equal(after[changed], -before[changed])
        with pytest.raises(NotImplementedError, match=changed):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(sparser)})


def save_rounded(folders, values, folder):
    """Save a model whose values bfloat16 holds too, dense and packed with these values."""
    model = flash_llm.from_pretrained(folders["llama"] / "dense")
    grid = quantize.GRIDS[values]
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):  # scales of a power of two
            groups = grid.groups(layer.weight.data)
            largest, column = groups.abs().max(0, keepdim=True)
            scales = 2.0 ** (largest / grid.largest).log2().ceil()
            steps = (groups / scales).round().scatter(0, column, grid.largest)
            layer.weight.data = grid.ungrouped(steps * scales, layer.in_features).contiguous()
    model.save_pretrained(folder / "dense")
    flash_llm.sparsify_(model, values=values)
    model.save_pretrained(folder / "packed")


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_quantised_values(values, folders, tmp_path):
    save_rounded(folders, values, tmp_path)
    method = {"quant_method": "flash_llm", "values": values}
    with engine(tmp_path / "dense") as llm:
        rounded = generate(llm)
    for options in (
        {"model": tmp_path / "packed"},
        {"model": tmp_path / "dense", "hf_overrides": {"quantization_config": method}},
    ):
        with engine(**options) as llm:
            assert_same(generate(llm), rounded)
            assert llm.apply_model(values_of_layers) == [{values}]


def test_quantised_tokens(folders, tmp_path):
    save_rounded(folders, "int8", tmp_path)
    flash_llm.convert_checkpoint(
        *(tmp_path / "dense", tmp_path / "w8a8"), values="int8", x_quantization="dynamic"
    )
    with engine(tmp_path / "packed") as llm:
        exact = generate(llm)
    with engine(tmp_path / "w8a8") as llm:
        of_folder = generate(llm)
        assert llm.apply_model(values_of_layers) == [{"int8"}]
    assert of_folder[1] != exact[1]
    method = {"quant_method": "flash_llm", "version": 1, "x_quantization": "dynamic"}
    with engine(tmp_path / "packed", hf_overrides={"quantization_config": method}) as llm:
        assert generate(llm) == of_folder


def values_of_layers(model):
    headers = [getattr(layer, "packed_header", None) for layer in model.modules()]
    return {header.values for header in headers if header is not None}


@pytest.mark.parametrize("values", ["16-bit", "int4"])
def test_random_weights_with_a_sparsity(values, folders):
    quantization = {"quant_method": "flash_llm", "sparsity": 0.8, "values": values}
    overrides = {"quantization_config": quantization}
    options = {"load_format": "dummy", "hf_overrides": overrides}
    with engine(folders["llama"] / "dense", **options) as llm:
        generate(llm)
        assert llm.apply_model(values_of_layers) == [{values}]
        for name, weight in layers(llm).items():
            assert (weight == 0).float().mean() == pytest.approx(0.8, abs=0.01), name
    with (
        pytest.raises(ValueError, match="sparsity"),
        engine(folders["llama"] / "dense", load_format="dummy", quantization="flash_llm"),
    ):
        pass


def test_adapters(folders, tmp_path):
    from vllm.lora.request import LoRARequest

    torch.manual_seed(1)
    sizes = {
        "self_attn.q_proj": (256, 256),
        "self_attn.v_proj": (128, 256),
        "mlp.up_proj": (512, 256),
    }
    adapter = {}
    for name, (rows, columns) in sizes.items():
        key = f"base_model.model.model.layers.1.{name}"
        adapter[f"{key}.lora_A.weight"] = torch.randn(8, columns) * 0.1
        adapter[f"{key}.lora_B.weight"] = torch.randn(rows, 8) * 0.1
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    modules = [name.rpartition(".")[2] for name in sizes]
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": modules}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = []
    for kind in ("dense", "packed"):
        with engine(folders["llama"] / kind, enable_lora=True, max_lora_rank=8) as llm:
            with_adapter = generate(llm, lora_request=LoRARequest("toy", 1, str(tmp_path)))
            found.append((generate(llm), with_adapter))
    for plain, with_adapter in zip(*found, strict=True):
        assert_same(plain, with_adapter)
    assert found[0][0][0] != found[0][1][0]


def test_compiled(folders, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))  # nothing that was compiled before
    with (
        torch._dynamo.config.patch(disable=False),
        engine(folders["llama"] / "packed", enforce_eager=False) as llm,
    ):
        assert_close(generate(llm), expected["llama"])  # it rounds less than uncompiled code


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize("way", ["tensor", "pipeline"])
def test_two_processes(way, folders, expected):
    with engine(folders["llama"] / "packed", **{f"{way}_parallel_size": 2}) as llm:
        assert_same(generate(llm), expected["llama"])


@pytest.mark.usefixtures("two_processes")
def test_a_damaged_file_stops_all_processes(folders, tmp_path, capfd):
    layer = "model.layers.1.mlp.up_proj"

    def damage(tensors):
        tensors[f"{layer}.weight_payload"][:64] = -1

    damaged = with_weights(folders["llama"] / "packed", tmp_path / "damaged", damage)
    with pytest.raises(Exception, match="."), engine(damaged, tensor_parallel_size=2):
        pass
    printed = "".join(capfd.readouterr())
    assert f"{layer} in {damaged / 'model.safetensors'} is malformed" in printed
