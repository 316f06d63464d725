"""The structure, kept by grep: each layer includes or imports only what stands to its left."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "flash_llm"

TOP_LEVEL = {
    "setup.py",
    "pyproject.toml",
    "csrc",
    "flash_llm",
    "tests",
    "examples",
    "benchmarks",
    "README.md",
    "LICENSE",
}

# Module -> rank. A module may import modules of a lower rank, and those of its own package folder.
# _extension finds the compiled module; testing holds inputs and oracles.
PYTHON_RANKS = {
    "_extension": 0,
    "forward": 0,
    "interrupts": 0,
    "io.files": 0,
    "progress": 0,
    "quantize": 0,
    "roles": 0,
    "smollm2": 0,
    "table": 0,
    "timing": 0,
    "weight_only": 0,
    "ops": 1,
    "report_base": 1,
    "formats": 2,
    "weight_view": 2,
    "linear": 3,
    "testing": 3,
    "integrations.tensor_parallel": 4,
    "io.checkpoint": 4,
    "select": 4,
    "integrations.adapters": 5,
    "integrations.hf_quantizer": 5,
    "io.encoded": 5,
    "io.unfinished": 5,
    "integrations.hf": 6,
    "io.dense_view": 6,
    "sparsify": 7,
    "integrations.vllm": 8,
    "evaluate": 8,
    "io.convert": 8,
    "io.verify": 9,
    "prune": 9,
    "bench": 10,
    "demo": 10,
    "doctor": 10,
    "io.report": 10,
    "cli": 11,
}

# Optional packages that a module may import at its top, because it is itself imported lazily.
OWNERS = {("transformers", "hf_quantizer.py"), ("peft", "adapters.py"), ("adapters", "adapters.py")}
# A package whose modules are imported by vLLM, whichever optional packages they import.
VLLM = PACKAGE / "integrations" / "vllm"

# The folders of csrc, from the lowest up.
LAYERS = ("base", "format", "plan", "cpu", "cuda", "torch")
HOST_LAYERS, BELOW_TORCH = LAYERS[:4], LAYERS[:5]

FOREIGN_INCLUDE = {
    "torch": re.compile(r"^(ATen|c10|torch|pybind11|Python\.h)\b"),
    "cuda": re.compile(r"^(cuda(?!/)|cu[a-z]+\.h|cub/|thrust/|cooperative_groups|nv/|mma\.h)"),
}


def sources(layer):
    found = sorted(p for p in (CSRC / layer).rglob("*") if p.is_file())
    assert found, f"csrc/{layer} is empty"
    return found


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_csrc_holds_its_layers_and_nothing_else():
    assert {p.name for p in CSRC.iterdir()} == {*LAYERS, "CMakeLists.txt", "README.md"}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_includes_only_what_stands_below_it(layer):
    may_see = LAYERS[: LAYERS.index(layer) + 1]
    forbidden = [kind for kind in ("cuda", "torch") if kind not in may_see]
    for path in sources(layer):
        for include in includes(path):
            if (CSRC / include).exists():
                assert include.split("/")[0] in may_see, f"{path} includes {include}"
                continue
            for kind in forbidden:
                assert not FOREIGN_INCLUDE[kind].match(include), f"{path} includes {include}"


def test_own_headers_are_included_by_their_path_under_csrc():
    for path in [path for layer in LAYERS for path in sources(layer)]:
        for quoted in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            assert (CSRC / quoted).exists(), f'{path}: "{quoted}" is no file under csrc/'


def test_what_is_below_cuda_is_host_code():
    for path in [path for layer in HOST_LAYERS for path in sources(layer)]:
        assert path.suffix in (".h", ".cpp"), path
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(r"\b(cudaStream_t|__global__|__shared__|threadIdx)\b", code), path


@pytest.mark.parametrize("layer", BELOW_TORCH)
def test_below_torch_nothing_prints_throws_or_exits(layer):
    pattern = re.compile(r"\b(std::cout|std::cerr|f?printf|throw|abort|exit|assert)\s*[(<;\s]")
    for path in sources(layer):
        code = re.sub(r"//.*", "", path.read_text())
        code = re.sub(r'"(\\.|[^"\\])*"', '""', code)
        code = code.replace("static_assert", "")
        found = pattern.search(code)
        assert not found, f"{path}: {found.group(0)!r}"


def test_setup_and_cmake_list_every_source_once():
    setup, cmake = (ROOT / "setup.py").read_text(), (CSRC / "CMakeLists.txt").read_text()
    for layer in LAYERS:
        for path in sources(layer):
            if path.suffix in (".cpp", ".cu"):
                name = path.relative_to(CSRC).as_posix()
                assert setup.count(f'"csrc/{name}"') == 1, name
                listed = len(re.findall(rf"^ +{re.escape(name)}\b", cmake, re.MULTILINE))
                assert listed == (layer in BELOW_TORCH), name
    for listed in re.findall(r'"csrc/(\S+\.(?:cpp|cu))"', setup):
        assert (CSRC / listed).exists(), listed


# Packages whose modules stand at several ranks; the modules of the others share one.
MIXED = ("integrations", "io")


def rank_name(dotted):
    """Of "io.files.read_json" or "prune.admm": the key of PYTHON_RANKS."""
    parts = dotted.split(".")
    return ".".join(parts[:2]) if parts[0] in MIXED and len(parts) > 1 else parts[0]


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_modules(path):
    """Yield (line, dotted name) of each import, local ones included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def python_files():
    found = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
    return [p for p in found if module_name(p) not in MIXED]


def test_every_python_module_has_a_rank():
    assert {rank_name(module_name(path)) for path in python_files()} == set(PYTHON_RANKS)


def test_python_modules_import_only_what_stands_to_their_left():
    for path in python_files():
        own = rank_name(module_name(path))
        for line, name in imported_modules(path):
            package, _, inner = name.partition(".")
            if package != "flash_llm" or not inner:
                continue
            other = rank_name(inner)
            if other in ("_C", "__version__") or other == own:
                continue
            assert other in PYTHON_RANKS, f"{path}:{line}: imports {name}"
            assert PYTHON_RANKS[other] < PYTHON_RANKS[own], f"{path}:{line}: imports {name}"


def test_the_package_itself_never_imports_tests_or_benchmarks():
    for path in PACKAGE.rglob("*.py"):
        for line, name in imported_modules(path):
            assert name.split(".")[0] not in ("tests", "benchmarks", "examples"), f"{path}:{line}"
            assert name.split(".")[0] != "pytest", f"{path}:{line}"


@pytest.mark.parametrize(
    "name", ["criteria", "reconstruction", "sparsegpt", "admm", "allocation", "inputs"]
)
def test_pruning_methods_import_tensors_and_one_another_only(name):
    pure = ("flash_llm.prune.criteria.", "flash_llm.prune.reconstruction.", "flash_llm.quantize.")
    for line, imported in imported_modules(PACKAGE / "prune" / f"{name}.py"):
        module = imported.split(".")[0]
        known = module in ("torch", "numpy") or module in sys.stdlib_module_names
        assert known or imported.startswith(pure), f"{name}.py:{line}: {imported}"


# hf_quantizer and adapters import transformers and PEFT, so they are themselves what is
# imported lazily.
@pytest.mark.parametrize(
    "name",
    ["transformers", "peft", "accelerate", "gguf", "rich", "typer", "huggingface_hub"]
    + ["hf_quantizer", "adapters", "vllm"],
)
def test_optional_packages_are_imported_lazily(name):
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            parts = {part for module in modules for part in module.split(".")}
            allowed = (name, path.name) in OWNERS
            # The script's entry point imports the commands, or says what is missing.
            allowed |= name == "typer" and path.parent.name == "cli" and path.stem != "__init__"
            allowed |= path.parent == VLLM and path.stem != "__init__"
            assert allowed or name not in parts, f"{path}:{node.lineno}"


def test_top_level_is_exact():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is tracked cannot be listed")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    assert {name for name in top if not name.startswith(".")} == TOP_LEVEL


def test_no_catch_all_modules():
    for folder in (CSRC, PACKAGE, ROOT / "tests", ROOT / "benchmarks"):
        for path in folder.rglob("*"):
            assert path.stem not in ("utils", "util", "common", "helpers", "misc"), path
