"""The examples run, and their results are right; the quickstart has its tests in test_demo.py."""

import copy
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_llm

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
LIBRARY = Path(flash_llm.__file__).parent / "libflash_llm.so"


def run(*command, cwd=None):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)


# ---- C++ ----


def why_no_cmake():
    """What building the C++ example lacks here, or ""."""
    if not shutil.which("cmake"):
        return "cmake is not installed"
    if torch.version.cuda and not shutil.which("nvcc") and not Path("/usr/local/cuda").exists():
        return "CMake's find_package(Torch) wants the CUDA toolkit for a CUDA build of torch"
    found = run("cmake", "--find-package", "-DNAME=nlohmann_json", "-DMODE=EXIST",
                "-DCOMPILER_ID=GNU", "-DLANGUAGE=CXX", cwd="/tmp")  # fmt: skip
    return "" if found.returncode == 0 else "nlohmann_json (nlohmann-json3-dev) is not installed"


@pytest.fixture(scope="module")
def packed_layer(tmp_path_factory):
    """The program of examples/cpp, built as its CMakeLists.txt says."""
    if reason := why_no_cmake():
        pytest.skip(reason)
    build = tmp_path_factory.mktemp("cpp")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    configured = run("cmake", "-S", EXAMPLES / "cpp", "-B", build, prefix)
    assert configured.returncode == 0, configured.stderr
    built = run("cmake", "--build", build)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning" not in built.stdout + built.stderr
    return build / "packed_layer"


def save_layers(folder, dtype=torch.bfloat16, seed=0):
    """Files of two layers, dense and packed."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(200, 136, dtype=dtype), torch.nn.Linear(136, 64, bias=False, dtype=dtype)
    )
    flash_llm.prune_(model, method="magnitude", sparsity=0.7)
    flash_llm.save(model, folder / "dense")
    report = flash_llm.sparsify_(model)
    assert len(report.packed) == 2
    flash_llm.save(model, folder / "packed")
    return folder / "packed" / "model.safetensors", folder / "dense" / "model.safetensors"


@pytest.mark.slow  # the compiler takes half a minute
def test_cpp_runs_a_packed_layer_as_the_dense_one(packed_layer, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        files = save_layers(tmp_path / str(dtype), dtype)
        for layer, shape in (("0", "[136, 200]"), ("1", "[64, 136]")):
            done = run(packed_layer, LIBRARY, *files, layer)
            assert done.returncode == 0, done.stdout + done.stderr
            assert done.stdout.startswith(f"{layer} {shape} on ")
            error = float(done.stdout.split("relative error ")[1].split()[0])
            assert 0 < error <= torch.finfo(dtype).eps


@pytest.mark.slow
def test_cpp_notices_what_is_wrong(packed_layer, tmp_path):
    packed, dense = save_layers(tmp_path)
    _, other = save_layers(tmp_path / "other", seed=1)
    done = run(packed_layer, LIBRARY, packed, other, "0")
    assert done.returncode == 1 and "relative error" in done.stdout

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(packed.read_bytes()[:-8])
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    wrong = {
        "no tensor 7.weight_header": (LIBRARY, packed, dense, "7"),
        "0.bias is cut short": (LIBRARY, cut, dense, "0"),
        "no whole header": (LIBRARY, empty, dense, "0"),
        "cannot open shared object file": (tmp_path / "libnone.so", packed, dense, "0"),
        "usage: packed_layer": (LIBRARY, packed),
    }
    for message, arguments in wrong.items():
        done = run(packed_layer, *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_the_operators_library_needs_no_python():
    if not shutil.which("nm"):
        pytest.skip("needs nm (binutils)")
    symbols = run("nm", "-D", "--undefined-only", LIBRARY).stdout
    assert "c10" in symbols
    assert not [line for line in symbols.splitlines() if line.split()[-1].startswith(("Py", "_Py"))]


# ---- offline scripts ----


def run_script(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.hf
def test_a_model_is_pruned_and_packed_offline(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    from test_hf import dense, output, sparse_layers
    from test_hf_models import tokenizer

    source, pruned, packed = (tmp_path / name for name in ("source", "pruned", "packed"))
    model = dense("llama", source)
    tokenizer().save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 96}" for i in range(400)))
    options = ["--text", text, "--sparsity", 0.75, "--samples", 4, "--seqlen", 32]
    run_script(monkeypatch, "prune_offline.py", source, pruned, *options)
    assert "14" in capsys.readouterr().out

    # Another call of the same method gives the same weights.
    ids = torch.tensor(tokenizer()(text.read_text())["input_ids"])
    starts = torch.linspace(0, len(ids) - 32, 4).long().tolist()
    samples = torch.stack([ids[start : start + 32] for start in starts])
    flash_llm.prune_(model, method="sparsegpt", sparsity=0.75, calibration=samples)
    expected = transformers.AutoModelForCausalLM.from_pretrained(pruned)
    assert torch.equal(output(expected), output(model))
    weight = model.model.layers[1].mlp.up_proj.weight
    assert (weight == 0).double().mean() == 0.75

    run_script(monkeypatch, "pack_offline.py", pruned, packed, "--prompt", "w5 w6")
    printed = capsys.readouterr().out
    again = flash_llm.from_pretrained(packed)
    assert sparse_layers(again) and "w5 w6" in printed
    for name in sparse_layers(again):
        assert torch.equal(again.get_submodule(name).weight, model.get_submodule(name).weight)
    with pytest.raises(FileExistsError):
        run_script(monkeypatch, "pack_offline.py", pruned, packed)


# ---- What examples/README.md says does not work ----


GUIDE = (EXAMPLES / "README.md").read_text()


@pytest.fixture
def packed_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    model = model.bfloat16().eval()
    flash_llm.sparsify_(model, sparsity=0.8)
    return model


def ones():
    return torch.ones(2, 64, dtype=torch.bfloat16)


def test_a_packed_model_has_no_onnx_export(packed_model, tmp_path):
    with pytest.raises(Exception, match="flash_llm"):
        torch.onnx.export(packed_model, (ones(),), tmp_path / "model.onnx", dynamo=False)


def test_a_packed_model_is_traced_and_exported_but_not_scripted(packed_model, tmp_path):
    with pytest.raises(Exception, match="annotation|script"):
        torch.jit.script(packed_model)
    file = tmp_path / "traced.pt"
    torch.jit.save(torch.jit.trace(packed_model, ones()), file)
    exported = torch.export.export(packed_model, (ones(),)).module()
    for model in (torch.jit.load(file), exported):
        assert torch.equal(model(ones()), packed_model(ones()))


@pytest.mark.filterwarnings("ignore:.*quantization:DeprecationWarning")
def test_quantising_leaves_packed_layers_as_they_are(packed_model):
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(packed_model))
    assert isinstance(quantised[0], flash_llm.SparseLinear)


def test_a_packed_weight_is_no_parameter(packed_model):
    assert [name for name, _ in packed_model.named_parameters()] == ["0.bias", "2.bias"]
    for parametrize in (
        lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
        torch.nn.utils.parametrizations.weight_norm,
    ):
        with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError)):
            parametrize(packed_model[0])


def test_float32_models_are_not_packed():
    with pytest.raises(TypeError, match="cast the model first"):
        flash_llm.sparsify_(torch.nn.Sequential(torch.nn.Linear(64, 64)), sparsity=0.8)


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.MultiheadAttention(64, 4),
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.Embedding(8, 8),
        torch.nn.LSTM(8, 8),
    ],
    ids=lambda module: type(module).__name__,
)
def test_only_linear_layers_are_packed(module):
    layer = torch.nn.Linear(64, 64)
    model = torch.nn.ModuleDict({"layer": layer, "other": module}).bfloat16()
    report = flash_llm.sparsify_(model, sparsity=0.8)
    assert [row.name for row in report.packed] == ["layer"]
    if not isinstance(module, torch.nn.MultiheadAttention):
        with pytest.raises(ValueError, match=type(module).__name__):
            flash_llm.sparsify_(model, [type(module).__name__], sparsity=0.8)


def test_code_that_multiplies_by_the_weight_itself_is_right(packed_model):
    layer = packed_model[0]
    expected = torch.nn.functional.linear(ones(), layer.to_linear().weight, layer.bias)
    assert torch.equal(torch.nn.functional.linear(ones(), layer.weight, layer.bias), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_right(packed_model):
    x = torch.randn(3, 2, 64).bfloat16()
    torch.testing.assert_close(torch.vmap(packed_model)(x), packed_model(x))


SNIPPETS = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def test_the_guides_snippets_prune_pack_and_multiply():
    first, _, int8, _ = SNIPPETS
    found = {}
    exec(first, found)
    exec(int8, found)
    assert found["packed"].values == "int8" and found["y"].shape == (4, 1024)


def test_the_guides_snippets_make_a_model_dense_and_pack_it_unpruned():
    _, pack, _, to_dense = SNIPPETS
    dense = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)).bfloat16()
    model = copy.deepcopy(dense)
    exec(pack, {"flash_llm": flash_llm, "model": model})
    assert all(isinstance(layer, flash_llm.SparseLinear) for layer in model)
    exec(to_dense, {"flash_llm": flash_llm, "model": model})
    for layer, before in zip(model, dense, strict=True):
        assert type(layer) is torch.nn.Linear and torch.equal(layer.weight, before.weight)
