"""Packed models through transformers' own save_pretrained and from_pretrained."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_import import outputs_of

import flash_llm
from flash_llm import SparseLinear, ops

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


TEXT = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
IMAGE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
IMAGE |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
# Models whose files do not have the names of the modules, or hold weights in other pieces.
RENAMED = {
    "names within blocks": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "names of towers": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": TEXT, "vision_config": IMAGE, "mm_tokens_per_image": 16},
    ),
    "names of models within models": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 64},
    ),
    "name of the head": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "one weight for three layers": ("NomicBertModel", "NomicBertConfig", TEXT),
}


def renamed(case, folder):
    """A small random model as transformers loads it, with zeros in its weights."""
    name, config, sizes = RENAMED[case]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(getattr(transformers, config)(**sizes)).to(torch.bfloat16)
    flash_llm.prune_(model, method="magnitude", sparsity=0.8)
    model.save_pretrained(folder)
    return cls.from_pretrained(folder)


def weights(model):
    """All tensors of a model, dense."""
    state = {name: t for name, t in model.state_dict().items() if ".weight_" not in name}
    return state | {f"{n}.weight": model.get_submodule(n).weight for n in sparse_layers(model)}


def assert_same_weights(actual, expected):
    actual, expected = weights(actual), weights(expected)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", RENAMED)
def test_packed_layers_go_where_transformers_loads_dense_ones(tmp_path, case):
    expected, model = renamed(case, tmp_path / "dense"), renamed(case, tmp_path / "dense")
    assert flash_llm.sparsify_(model, pack_unprofitable=True).packed
    for folder in ("packed", "again"):
        model.save_pretrained(tmp_path / folder)
        names = sparse_layers(model)
        model = flash_llm.from_pretrained(tmp_path / folder)
        assert sparse_layers(model) == names
        assert_same_weights(model, expected)
    model.dequantize().save_pretrained(tmp_path / "dequantized")
    assert_same_weights(type(model).from_pretrained(tmp_path / "dequantized"), expected)


@pytest.mark.parametrize("case", RENAMED)
def test_converted_folders_load_whole(tmp_path, case):
    expected = renamed(case, tmp_path / "dense")
    options = {"pack_unprofitable": True, "ignore": ()}
    report = flash_llm.convert_checkpoint(tmp_path / "dense", tmp_path / "packed", **options)
    again = flash_llm.from_pretrained(tmp_path / "packed")
    assert len(sparse_layers(again)) == len(report.packed) > 0
    assert_same_weights(again, expected)


def test_names_of_the_callers_own_place_packed_layers_too(tmp_path):
    model = packed("llama", tmp_path)
    model.save_pretrained(tmp_path)
    change(tmp_path, lambda t: {name.replace("mlp.", "ffn."): t[name] for name in t})
    with pytest.raises(ValueError, match=r"lacks .*mlp.*packed .*ffn"):
        flash_llm.from_pretrained(tmp_path)
    again = flash_llm.from_pretrained(tmp_path, key_mapping={r"\.ffn\.": ".mlp."})
    assert_same_weights(again, model)


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
    ids = IDS.to(again.device)  # on a machine with a GPU "auto" is that GPU
    with torch.inference_mode():
        assert torch.equal(again(ids)[0], model.to(again.device)(ids)[0])


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


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_another_half_precision_is_loaded_by_asking_for_it(tmp_path, family):
    model = packed(family, tmp_path)
    model.save_pretrained(tmp_path)
    again = flash_llm.from_pretrained(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in again.parameters()} == {torch.float16}
    assert sparse_layers(again) == sparse_layers(model)
    assert_same_weights(again, model.to(torch.float16))
    assert output(again).dtype == torch.float16


def test_subfolders_are_found(tmp_path):
    model = packed("llama", tmp_path)
    model.save_pretrained(tmp_path / "outer" / "inner")
    again = flash_llm.from_pretrained(tmp_path / "outer", subfolder="inner")
    assert_same_weights(again, model)


OWN_CODE = """
from transformers import LlamaForCausalLM

class Own(LlamaForCausalLM):
    pass
"""


def test_code_of_a_models_own_runs_only_by_asking_for_it(tmp_path):
    model = packed("llama", tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(OWN_CODE)
    edit_config_of(tmp_path, architectures=["Own"], auto_map={"AutoModelForCausalLM": "own.Own"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        flash_llm.from_pretrained(tmp_path, trust_remote_code=False)
    again = flash_llm.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__name__ == "Own"
    assert_same_weights(again, model)


def test_files_may_change_after_loading(tmp_path):
    model = packed("llama", tmp_path)
    model.save_pretrained(tmp_path)
    again = flash_llm.from_pretrained(tmp_path)
    expected = {name: again.get_submodule(name).weight for name in sparse_layers(again)}
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:  # in place: what is mapped would change
        opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(again.get_submodule(n).weight, w) for n, w in expected.items())


# ---- packed in other ways than by sparsify_ of the model ----


def by_layer(model):
    for name in [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]:
        if "proj" in name:
            parent, _, child = name.rpartition(".")
            layer = SparseLinear.from_linear(model.get_submodule(name), sparsity=0.8)
            setattr(model.get_submodule(parent), child, layer)


BY_HAND = {
    "sparsify_ of each block": lambda m: [
        flash_llm.sparsify_(block, sparsity=0.8, pack_unprofitable=True) for block in m.model.layers
    ],
    "int8 values": lambda m: flash_llm.sparsify_(m, sparsity=0.5, values="int8"),
    "int4 values as GPUs have them": lambda m: flash_llm.sparsify_(
        m, sparsity=0.5, values="int4", format="quantized_bitmap"
    ),
    "from_linear": by_layer,
    "load": lambda m: (
        flash_llm.save(packed_copy(m), m.name_or_path + "/plain")
        or flash_llm.load(m, m.name_or_path + "/plain")
    ),
}


def packed_copy(model):
    model = copy.deepcopy(model)
    flash_llm.sparsify_(model, sparsity=0.8, pack_unprofitable=True)
    return model


@pytest.mark.parametrize("way", BY_HAND)
def test_however_it_was_packed_it_is_saved_to_be_loaded(tmp_path, way):
    model = dense("llama", tmp_path / "dense")
    BY_HAND[way](model)
    for part, cls in ((model, "LlamaForCausalLM"), (model.model, "LlamaModel")):
        part.save_pretrained(tmp_path / cls)
        again = getattr(transformers, cls).from_pretrained(tmp_path / cls)
        assert sparse_layers(again) == sparse_layers(part) != set()
        assert_same_weights(again, part)
    assert not sparse_layers(model.dequantize())


def test_how_inputs_are_rounded_is_saved_if_all_layers_agree(tmp_path):
    model = dense("llama", tmp_path / "dense")
    flash_llm.sparsify_(model, ["up_proj", "down_proj"], values="int8")
    flash_llm.sparsify_(model, ["q_proj"], sparsity=0.8)
    layers = {name: model.get_submodule(name) for name in sparse_layers(model)}
    for layer in layers.values():
        layer.x_quantization = "dynamic"
    model.save_pretrained(tmp_path / "all")
    config = json.loads((tmp_path / "all" / "config.json").read_text())["quantization_config"]
    assert config["x_quantization"] == "dynamic"
    again = flash_llm.from_pretrained(tmp_path / "all")
    for name, layer in layers.items():
        found = again.get_submodule(name).x_quantization
        assert found == (None if layer.values == "16-bit" else "dynamic")
    assert torch.equal(output(again), output(model))
    next(layer for layer in layers.values() if layer.values == "int8").x_quantization = None
    model.save_pretrained(tmp_path / "some")
    config = json.loads((tmp_path / "some" / "config.json").read_text())["quantization_config"]
    assert "x_quantization" not in config
    edit_config(tmp_path / "some", x_quantization="static")
    with pytest.raises(ValueError, match="x_quantization.*static"):
        flash_llm.from_pretrained(tmp_path / "some")


def test_int8_values_that_overflow_the_dtype_to_load_in_are_refused_by_name(tmp_path):
    model = dense("llama", tmp_path / "dense")
    flash_llm.sparsify_(model, values="int8")
    layer = model.model.layers[1].mlp.up_proj
    values, scales = layer.packed.to_quantized()
    layer.weight_payload = ops.pack_quantized(values, scales * 1e9, torch.bfloat16).payload
    model.save_pretrained(tmp_path)
    assert flash_llm.from_pretrained(tmp_path).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj .*row 0"):
        flash_llm.from_pretrained(tmp_path, dtype=torch.float16)


def test_what_was_made_dense_by_hand_is_saved_as_dense(tmp_path):
    model = packed("llama", tmp_path)
    model.save_pretrained(tmp_path)
    again = flash_llm.from_pretrained(tmp_path)
    for name in sparse_layers(again):
        parent, _, child = name.rpartition(".")
        setattr(again.get_submodule(parent), child, again.get_submodule(name).to_linear())
    again.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


def test_a_model_that_is_quantised_in_another_way_too_is_refused(tmp_path):
    class Other:
        quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)

    model = dense("llama", tmp_path / "dense")
    model.hf_quantizer = Other()
    by_layer(model)
    with pytest.raises(ValueError, match=r"q_proj is packed, .* quantised by"):
        model.save_pretrained(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


# ---- bad input ----


def edit_config_of(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(folder, **changes):
    method = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config_of(folder, quantization_config=method | changes)


def change(folder, edit):
    """Rewrite a folder's tensors as ``edit`` says."""
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, {"format": "pt", "flash_llm": "1"})


UP = "model.layers.1.mlp.up_proj"
INCOMPLETE = {
    "a packed layer is missing": lambda t: {n: t[n] for n in t if UP not in n},
    "a packed layer has another name": lambda t: {n.replace(UP, UP + "x"): t[n] for n in t},
    "all packed layers are missing": lambda t: {n: t[n] for n in t if ".weight_" not in n},
    "a dense weight is missing": lambda t: {n: t[n] for n in t if n != "model.norm.weight"},
}


@pytest.mark.parametrize("case", INCOMPLETE)
@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel"])
def test_no_weight_of_a_packed_folder_is_ever_random(tmp_path, case, auto):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    change(tmp_path, INCOMPLETE[case])
    name = r"norm\.weight" if "dense" in case else r"layers\.[01]\..*proj\.weight"
    name += r".* packed model\.layers\.1\.mlp\.up_projx in .*safetensors" * ("name" in case)
    with pytest.raises(ValueError, match=f"lacks .*{name}"):
        getattr(transformers, auto).from_pretrained(tmp_path)


CONFIGS = {
    "none": lambda config: config.pop("quantization_config"),
    "null": lambda config: config.update(quantization_config=None),
    "misspelt key": lambda config: config.update(quantisation=config.pop("quantization_config")),
    "misspelt method": lambda config: config["quantization_config"].update(quant_method="flashllm"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_packed_tensors_are_refused_whatever_the_config_says(tmp_path, case):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    CONFIGS[case](config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = r"model\.safetensors .*weight_.*quantization_config"
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message.replace(r"model\.safetensors", "state dict")):
        transformers.LlamaForCausalLM.from_pretrained(
            None,
            config=transformers.LlamaConfig(**SIZES),
            state_dict=load_file(tmp_path / "model.safetensors"),
        )


def test_a_new_head_is_made_as_for_dense_folders(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path, num_labels=3, pad_token_id=0)
    assert model.score.weight.shape == (3, 64)
    assert sparse_layers(model)


def test_a_dense_tensor_of_another_shape_is_named(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    change(tmp_path, lambda t: t | {"model.norm.weight": torch.ones(1, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight in .*safetensors has shape \[1\]"):
        flash_llm.from_pretrained(tmp_path)


def test_packed_weights_that_transformers_would_join_are_refused(tmp_path):
    model = renamed("one weight for three layers", tmp_path)
    edit_config_of(tmp_path, quantization_config={"quant_method": "flash_llm", "version": 1})

    def pack(tensors):
        name = "encoder.layers.0.attn.Wqkv"
        layer = torch.nn.Linear(64, 192, bias=False, dtype=torch.bfloat16)
        layer.weight.data = tensors.pop(f"{name}.weight")
        state = SparseLinear.from_linear(layer).state_dict()
        return tensors | {f"{name}.{part}": tensor for part, tensor in state.items()}

    change(tmp_path, pack)
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.Wqkv is packed in .*safetensors, but"):
        type(model).from_pretrained(tmp_path)


def test_newer_versions_are_refused(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    edit_config(tmp_path, version=2)
    with pytest.raises(NotImplementedError, match="version 2, this flash_llm reads up to 1"):
        flash_llm.from_pretrained(tmp_path)


def test_what_a_later_version_may_add_is_ignored(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    edit_config(tmp_path, recipe={"sparsity": 0.8})
    assert sparse_layers(flash_llm.from_pretrained(tmp_path))


def test_float32_is_refused_with_the_right_dtype(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"model\.safetensors; build the model in torch.bfloat16"):
        flash_llm.from_pretrained(tmp_path, dtype=torch.float32)


def test_packing_while_loading_is_refused_with_the_way_to_do_it(tmp_path):
    from flash_llm.integrations.hf_quantizer import FlashLLMConfig

    dense("llama", tmp_path)
    with pytest.raises(ValueError, match="flash_llm|calibrate"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=FlashLLMConfig()
        )


def test_a_broken_file_is_named(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        flash_llm.from_pretrained(tmp_path)


@pytest.mark.parametrize("architectures", [["No"], ["logging"], ["PreTrainedConfig"], [], None])
def test_an_architecture_that_transformers_lacks(tmp_path, architectures):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    edit_config_of(tmp_path, architectures=architectures)
    name = architectures[0] if architectures else ""
    with pytest.raises(ValueError, match=f"names architecture '{name}'"):
        flash_llm.from_pretrained(tmp_path)


# ---- who is imported first ----

LOAD = """
model = AutoModelForCausalLM.from_pretrained({folder!r})
print(type(model.model.layers[0].mlp.up_proj))
"""


# The other tests import flash_llm first, and test_peft.py transformers.
IMPORTS = [
    "import flash_llm.integrations.hf_quantizer; from transformers import AutoModelForCausalLM",
    "import transformers.quantizers.auto; import flash_llm\n"
    "from transformers import AutoModelForCausalLM",
]


def test_either_package_may_be_imported_first(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    load = LOAD.format(folder=str(tmp_path))
    printed, errors = outputs_of(imports + load for imports in IMPORTS)
    for imports, layer in zip(IMPORTS, printed, strict=True):
        assert "SparseLinear" in layer, (imports, errors)


INTERRUPTED = """
import sys
import flash_llm

waiting = True

def interrupt(event, arguments):
    global waiting
    if waiting and event == "exec" and arguments[0].co_filename.endswith({where!r}):
        waiting = False
        raise KeyboardInterrupt

sys.addaudithook(interrupt)
try:
    import transformers.modeling_utils
    raise SystemExit("not interrupted")
except KeyboardInterrupt:
    from transformers import AutoModelForCausalLM
"""


def test_an_interrupted_import_of_transformers_is_made_up_for(tmp_path):
    packed("llama", tmp_path).save_pretrained(tmp_path)
    load = LOAD.format(folder=str(tmp_path))
    places = [
        "transformers/modeling_utils.py",
        "flash_llm/integrations/hf_quantizer.py",
        "quantizers/auto.py",
    ]
    printed, errors = outputs_of(INTERRUPTED.format(where=where) + load for where in places)
    for where, layer in zip(places, printed, strict=True):
        assert "SparseLinear" in layer, (where, errors)


def test_a_transformers_that_we_do_not_know_stays_importable(monkeypatch, caplog):
    from flash_llm.integrations import hf

    monkeypatch.setattr(hf, "register", lambda: 1 / 0)
    hf.register_when_imported()
    assert "packed checkpoints cannot be loaded: division by zero" in caplog.text


def test_an_index_cannot_lead_out_of_a_packed_folder(tmp_path):
    model = packed("llama", tmp_path / "inside")
    model.save_pretrained(tmp_path / "inside", max_shard_size="50KB")
    index = tmp_path / "inside/model.safetensors.index.json"
    places = json.loads(index.read_text())
    name = next(iter(places["weight_map"].values()))
    (tmp_path / "inside" / name).rename(tmp_path / name)
    for elsewhere in (f"../{name}", str(tmp_path / name)):
        moved = {k: elsewhere if v == name else v for k, v in places["weight_map"].items()}
        index.write_text(json.dumps({**places, "weight_map": moved}))
        for loader in (flash_llm, type(model)):
            with pytest.raises(ValueError, match=name):
                loader.from_pretrained(tmp_path / "inside")
