"""The examples run, and their results are right; the quickstart has its tests in test_demo.py."""

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
