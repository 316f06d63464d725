"""Packed models through transformers' own save_pretrained and from_pretrained."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

import flash_llm
from flash_llm import SparseLinear

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# Every family with its own names, fused projections, biases, Conv1D layers or tied head.
FAMILIES = {
    "llama": ("LlamaConfig", {"intermediate_size": 128, "num_key_value_heads": 2}),
    "qwen2": (
        "Qwen2Config",
        {"intermediate_size": 128, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", {"intermediate_size": 128, "num_key_value_heads": 2}),
    "opt": (
        "OPTConfig",
        {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
    ),
    "gpt2": ("GPT2Config", {"n_positions": 64}),
    "bert": ("BertConfig", {"intermediate_size": 128, "max_position_embeddings": 64}),
}
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def dense(family, folder):
    """A small random model, loaded once: casting would round buffers that loading leaves alone."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES, **sizes)
    auto = auto_class(family)
    auto.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return auto.from_pretrained(folder)


def auto_class(family):
    return transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM


def packed(family, folder, **options):
    model = dense(family, folder / "dense")
    report = flash_llm.sparsify_(model, sparsity=0.8, pack_unprofitable=True, **options)
    assert report.packed
    return model


def output(model):
    with torch.inference_mode():
        return model(IDS)[0]


def sparse_layers(model):
    return {n for n, m in model.named_modules() if isinstance(m, SparseLinear)}


@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_outputs_after_the_round_trip_are_bit_equal(tmp_path, family, max_shard_size):
    model = packed(family, tmp_path)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "5GB")
    for again in (
        auto_class(family).from_pretrained(tmp_path),
        flash_llm.from_pretrained(tmp_path),
    ):
        assert type(again) is type(model) and not again.training
        assert sparse_layers(again) == sparse_layers(model)
        assert torch.equal(output(again), output(model))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(output(flash_llm.from_pretrained(tmp_path / "again")), output(model))


def test_every_format_comes_back_in_the_best_one_for_the_device(tmp_path, format):
    model = packed("llama", tmp_path, format=format)
    model.save_pretrained(tmp_path)
    again = flash_llm.from_pretrained(tmp_path)
    layer, saved = again.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    assert saved.packed.FORMAT == format
    assert layer.packed.FORMAT == flash_llm.pack(layer.weight).FORMAT
    assert torch.equal(layer.weight, saved.weight)


def test_config_and_files_name_the_method_and_its_version(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "flash_llm", "version": 1}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"flash_llm": "1", "format": "pt"}


def test_a_model_that_was_not_packed_is_saved_as_ever(tmp_path):
    model = dense("llama", tmp_path / "dense")
    flash_llm.sparsify_(model, sparsity=0.0)  # packing would not shrink it
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(output(flash_llm.from_pretrained(tmp_path)), output(model))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(tmp_path, device_map):
    model = packed("llama", tmp_path)
    model.save_pretrained(tmp_path)
    again = flash_llm.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(output(again).cpu(), output(model))


def test_layers_may_be_offloaded_to_disk(tmp_path):
    model = packed("llama", tmp_path)
    model.save_pretrained(tmp_path)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    again = flash_llm.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload", offload_buffers=True
    )
    assert again.model.layers[1].mlp.up_proj.weight_payload.is_meta
    assert torch.equal(output(again), output(model))


def test_the_bare_model_and_the_one_with_a_head_load_from_each_other(tmp_path):
    model = packed("llama", tmp_path)
    model.save_pretrained(tmp_path / "head")
    bare = transformers.AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(output(bare), output(model.model))
    bare.save_pretrained(tmp_path / "bare")
    headed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    assert sparse_layers(headed) == sparse_layers(model)
    assert torch.equal(output(headed.model), output(bare))


def test_dequantize_gives_a_dense_model_that_is_saved_as_one(tmp_path):
    model = packed("gpt2", tmp_path)
    expected = output(model)
    model.save_pretrained(tmp_path)
    again = flash_llm.from_pretrained(tmp_path).dequantize()
    assert not sparse_layers(again)
    torch.testing.assert_close(output(again), expected, rtol=0.02, atol=0.02)


def test_generation_and_training_of_adapters_are_not_refused(tmp_path):
    model = packed("llama", tmp_path)
    model.save_pretrained(tmp_path)
    again = flash_llm.from_pretrained(tmp_path)
    assert again.hf_quantizer.is_trainable and again.hf_quantizer.is_compileable
    ids = again.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(ids, model.generate(IDS, max_new_tokens=3, do_sample=False))


# ---- bad input ----


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def test_newer_versions_are_refused(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    edit_config(tmp_path, version=2)
    with pytest.raises(NotImplementedError, match="version 2, this flash_llm reads up to 1"):
        flash_llm.from_pretrained(tmp_path)


def test_what_a_later_version_may_add_is_ignored(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    edit_config(tmp_path, recipe={"sparsity": 0.8})
    assert sparse_layers(flash_llm.from_pretrained(tmp_path))


def test_another_dtype_is_refused_with_the_right_one(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="packed as torch.bfloat16; build the model in"):
        flash_llm.from_pretrained(tmp_path, dtype=torch.float16)


def test_packing_while_loading_is_refused_with_the_way_to_do_it(tmp_path):
    from flash_llm.hf_quantizer import FlashLLMConfig

    dense("llama", tmp_path)
    with pytest.raises(ValueError, match="flash_llm|calibrate"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=FlashLLMConfig()
        )


def test_a_broken_file_is_named(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        flash_llm.from_pretrained(tmp_path)


def test_an_architecture_that_transformers_lacks(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["No"]}))
    with pytest.raises(ValueError, match="names architecture 'No'"):
        flash_llm.from_pretrained(tmp_path)


# ---- who is imported first ----

LOAD = """
model = AutoModelForCausalLM.from_pretrained({folder!r})
print(type(model.model.layers[0].mlp.up_proj))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "from flash_llm.hf_quantizer import METHOD; from transformers import AutoModelForCausalLM",
        "import flash_llm; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import flash_llm",
        "import transformers.quantizers.auto; import flash_llm\n"
        "from transformers import AutoModelForCausalLM",
    ],
)
def test_either_package_may_be_imported_first(tmp_path, imports):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    code = imports + LOAD.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "SparseLinear" in done.stdout, done.stderr


def test_importing_flash_llm_does_not_import_transformers():
    code = "import flash_llm, sys; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_a_transformers_that_we_do_not_know_stays_importable(monkeypatch, caplog):
    from flash_llm import hf

    monkeypatch.setattr(hf, "register", lambda: 1 / 0)
    hf.register_when_imported()
    assert "packed checkpoints cannot be loaded: division by zero" in caplog.text
