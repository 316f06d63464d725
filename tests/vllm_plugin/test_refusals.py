"""What cannot be served stops with an error that names the file and the tensor."""

import json
import pickle
import shutil

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm.config", reason="needs vLLM; .ci/run makes an environment for it")

from engines import engine  # noqa: E402

from flash_llm import _extension  # noqa: E402


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the packed folder, to be damaged."""
    shutil.copytree(folders["llama"] / "packed", tmp_path / "packed")
    return tmp_path / "packed"


def change_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder, **quantization):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(quantization)
    file.write_text(json.dumps(config))


def configured(folder, **options):
    """What vLLM makes of a folder before it starts a worker."""
    from vllm.engine.arg_utils import EngineArgs

    options = {"dtype": "bfloat16", "skip_tokenizer_init": True} | options
    return EngineArgs(model=str(folder), **options).create_engine_config()


LAYER = "model.layers.1.mlp.up_proj"


def test_the_configuration_reaches_the_workers(folder):
    config = pickle.loads(pickle.dumps(configured(folder).quant_config))
    assert LAYER in config.stored
    assert config.file_of(LAYER) == str(folder / "model.safetensors")


def test_a_name_on_the_hub(folders, tmp_path, monkeypatch):
    import huggingface_hub
    from vllm.transformers_utils.config import get_config

    from flash_llm.integrations.vllm.config import FlashLLMConfig

    repository = tmp_path / "models--toys--llama"
    commits = {"packed": "a" * 40, "dense": "b" * 40}
    for kind, commit in commits.items():
        shutil.copytree(folders["llama"] / kind, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits["dense"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = get_config("toys/llama", trust_remote_code=False, revision=commits["packed"])
    config = FlashLLMConfig(packed_folder=True)
    config.maybe_update_config("toys/llama", model)
    assert config.file_of(LAYER) == str(
        repository / "snapshots" / commits["packed"] / "model.safetensors"
    )


def test_newer_folder(folder):
    change_config(folder, version=99)
    with pytest.raises(NotImplementedError, match="version 99"):
        configured(folder)


def test_newer_packed_format(folder):
    def newer(tensors):
        tensors[f"{LAYER}.weight_header"][1] = 99

    change_weights(folder, newer)
    with pytest.raises(NotImplementedError, match=f"{LAYER}.*model.safetensors.*99"):
        configured(folder)


def test_unknown_key(folder):
    change_config(folder, sparcity=0.8)
    with pytest.raises(ValueError, match="sparcity"):
        configured(folder)


@pytest.mark.parametrize(("sparsity", "error"), [(1.5, ValueError), ("0.8", TypeError)])
def test_sparsity(folder, sparsity, error):
    change_config(folder, sparsity=sparsity)
    with pytest.raises(error, match="sparsity"):
        configured(folder)


@pytest.mark.parametrize(("tokens", "error"), [(0, ValueError), ("8", TypeError)])
def test_expected_tokens(folder, tokens, error):
    change_config(folder, expected_tokens=tokens)
    with pytest.raises(error, match="expected_tokens"):
        configured(folder)


def test_x_quantization(folder):
    change_config(folder, x_quantization="static")
    with pytest.raises(ValueError, match="x_quantization .*static"):
        configured(folder)


@pytest.mark.parametrize(("option", "value"), [("sparsity", 0.8), ("values", "int8")])
def test_an_option_of_dense_models_for_a_packed_folder(option, value, folder):
    change_config(folder, **{option: value})
    with pytest.raises(ValueError, match=rf"{option} .*model\.layers.*model\.safetensors"):
        configured(folder)


def test_values(folder):
    change_config(folder, values="int5")
    with pytest.raises(ValueError, match='values .*"int5"'):
        configured(folder)


def test_a_packed_folder_without_packed_layers(folders, tmp_path):
    shutil.copytree(folders["llama"] / "dense", tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    config["quantization_config"] = {"quant_method": "flash_llm", "version": 1}
    (tmp_path / "dense/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=str(tmp_path / "dense")):
        configured(tmp_path / "dense")


def test_dtype(folder):
    with pytest.raises(ValueError, match="float32"):
        configured(folder, dtype="float32")


def test_quantization_given_twice(folder):
    with pytest.raises(ValueError, match="flash_llm"):
        configured(folder, quantization="fp8")


def test_uneven_parts(folder):
    with pytest.raises(ValueError, match="4.*3"):  # heads, and processes to share them
        configured(folder, tensor_parallel_size=3)


def test_missing_extension(folder, monkeypatch):
    monkeypatch.setattr(_extension, "_module", None)
    with pytest.raises(RuntimeError, match=r"flash_llm\._C"):
        configured(folder)


@pytest.mark.parametrize(
    ("version", "registered"), [("0.20.2", False), ("0.21.0", True), ("0.27.0", False)]
)
def test_versions_of_vllm(version, registered, monkeypatch, caplog):
    import logging

    import vllm
    from vllm.model_executor.layers import quantization

    from flash_llm.integrations.vllm import register

    monkeypatch.setattr(vllm, "__version__", version)
    others = [name for name in quantization.QUANTIZATION_METHODS if name != "flash_llm"]
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", others)
    from flash_llm.integrations.vllm import config

    monkeypatch.setattr(config, "QUANTIZATION_METHODS", others)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    register()
    register()
    assert others.count("flash_llm") == registered
    assert (version in caplog.text) != registered


def test_damaged_payload(folder):
    def damage(tensors):
        tensors[f"{LAYER}.weight_payload"][:64] = -1

    change_weights(folder, damage)
    with pytest.raises(ValueError, match=f"{LAYER}.*model.safetensors"), engine(folder):
        pass


@pytest.mark.parametrize("missing", ["k_proj.weight", "q_proj.bias"])
def test_missing_tensor(missing, folder):
    missing = f"model.layers.1.self_attn.{missing}"
    change_weights(folder, lambda tensors: tensors.pop(missing))
    with pytest.raises(ValueError, match=missing), engine(folder):
        pass


def test_missing_norm(folder):
    change_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    track = {"model_loader_extra_config": {"enable_weights_track": True}}  # as the guide says
    with pytest.raises(ValueError, match=r"{'model\.norm\.weight'}"), engine(folder, **track):
        pass


def test_missing_weight_of_a_dense_folder(folders, tmp_path):
    shutil.copytree(folders["llama"] / "dense", tmp_path / "dense")
    change_weights(tmp_path / "dense", lambda tensors: tensors.pop(f"{LAYER}.weight"))
    with (
        pytest.raises(ValueError, match=f"{LAYER}.weight"),
        engine(tmp_path / "dense", quantization="flash_llm"),
    ):
        pass


@pytest.mark.parametrize("options", [{"cpu_offload_gb": 1}, {"offload_group_size": 2}])
def test_weights_on_the_cpu(options, folder):
    with (
        pytest.raises(NotImplementedError, match=next(iter(options))),
        engine(folder, **options),
    ):
        pass


def test_packed_output_layer(folders, tmp_path):
    import flash_llm
    from flash_llm import SparseLinear

    model = flash_llm.from_pretrained(folders["llama"] / "dense")
    model.lm_head = SparseLinear.from_linear(model.lm_head, sparsity=0.8)
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(NotImplementedError, match="lm_head"), engine(tmp_path / "packed"):
        pass
