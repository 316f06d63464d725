"""Importing flash_llm is free and never fails; the first use says what is missing."""

import json
import subprocess
import sys
from pathlib import Path

from formats import ALL_FORMATS, GPU_FORMATS

import flash_llm
from flash_llm import _extension

ROOT = Path(__file__).resolve().parents[1]

# Stands in for the extension: loads, but says that it was built against another torch.
OTHER_TORCH = """
import sys, types
fake = types.ModuleType("flash_llm._C")
fake.build_info = lambda: {"torch": "1.2.3"}
sys.modules["flash_llm._C"] = fake
"""

# Makes loading the extension fail with the given expression.
FAILING_LOAD = """
import importlib.abc, sys
class Fail(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "flash_llm._C":
            raise {error}
sys.meta_path.insert(0, Fail())
"""

# Runs each program in a process of its own, all at once, and prints what each printed as JSON;
# fails if one of them does. They are forked because importing torch takes seconds.
EACH = """
import json, os, sys, torch
children = []
for code in sys.argv[1:]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        exec(code, {})
        sys.stdout.flush()
        os._exit(0)
    os.close(writer)
    children.append((child, reader))
print(json.dumps([open(reader).read() for _, reader in children]))
statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children]
if any(statuses):
    sys.exit(f"the programs exit with {statuses}")
"""

USE = """
import torch, flash_llm
try:
    flash_llm.pack(torch.zeros(2, 2, dtype=torch.float16))
except RuntimeError as error:
    print(error)
"""


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


def outputs_of(programs):
    """Run each program in a process where only torch was imported.

    Returns what each printed, and what all of them wrote to stderr.
    """
    result = run_python(EACH, *programs)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def test_importing_and_explaining_a_plan_print_nothing_and_make_no_cuda_context():
    result = run_python(
        "import flash_llm, sys, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'transformers', 'accelerate', 'gguf', 'typer', 'rich', 'datasets', 'vllm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "flash_llm.explain_plan(64, 8, 64, 9, compute_capability=90, num_sms=132,"
        " smem_per_sm_bytes=233472)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


UNUSABLE = {
    "built against torch 1.2.3": OTHER_TORCH,
    "does not load: ImportError: _C.so: undefined symbol: _ZN3c10": FAILING_LOAD.format(
        error="ImportError('_C.so: undefined symbol: _ZN3c10')"
    ),
    "libcudart.so.13": FAILING_LOAD.format(error="OSError('libcudart.so.13: not found')"),
    "no built extension": FAILING_LOAD.format(
        error="ModuleNotFoundError('no', name='flash_llm._C')"
    ),
}


def test_unusable_extensions_import_and_explain_at_first_use():
    messages, errors = outputs_of(setup + USE for setup in UNUSABLE.values())
    assert errors == ""
    for found, message in zip(UNUSABLE, messages, strict=True):
        assert found in message
        assert "Found:" in message and "Needed:" in message
        assert "pip install --no-build-isolation -e ." in message


def test_every_exported_name_is_there():
    for name in flash_llm.__all__:
        assert hasattr(flash_llm, name), name


def test_build_info_configs_and_plan():
    info = flash_llm.build_info()
    assert set(info) == {"cuda", "cuda_version", "cuda_archs", "torch", "compiler", "reason"}
    assert bool(info["reason"]) != info["cuda"]
    rows = flash_llm.configs()
    keys = {"name", "format", "tile_n", "ctas_per_sm", "smem_bytes"}
    assert rows and all(set(row) > keys for row in rows)
    extension = _extension.require()
    assert {row["format"] for row in rows} == {*GPU_FORMATS, "quantized_bitmap"}
    assert set(extension.FORMATS) == set(ALL_FORMATS)
    for format in extension.FORMATS:
        names = extension.plan_names(format, True)
        assert {row["name"] for row in rows if row["format"] == format} < set(names)
        assert "dense" in names and "dense" in extension.plan_names(format, False)
    text = flash_llm.explain_plan(
        28672,
        8,
        7168,
        41_000_000,
        compute_capability=90,
        num_sms=132,
        smem_per_sm_bytes=233472,
        config="n8",
    )
    assert "n8" in text
