"""The command line: parsing, exit codes, and the doctor behind it."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from formats import FORMATS
from safetensors.torch import save_file

import flash_llm
from flash_llm import bench, demo, doctor, interrupts, ops
from flash_llm.io.unfinished import NOTE_NAME
from flash_llm.prune.methods import METHODS

typer = pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402

from flash_llm.cli.app import COMMANDS, EXIT_CODES, build_app  # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(flash_llm.__file__).parents[1])}
SCRIPT = [sys.executable, "-c", "from flash_llm.cli import main; main()"]


def invoke(*arguments):
    # Wide enough that no line of the help is broken.
    return CliRunner().invoke(build_app(), [*map(str, arguments)], env={"COLUMNS": "200"})


def start(command, **options):
    """Start a process that Ctrl-C can reach, even if the tests run where it is ignored."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def test_help_lists_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in result.output
    assert EXIT_CODES in result.output


def test_the_version_is_printed():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"flash-llm {flash_llm.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_json_and_says_its_exit_codes(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.output and EXIT_CODES in result.output
    # What makes a folder can say beforehand what it would do.
    assert ("--dry-run" in result.output) == ("target" in result.output)


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(demo, "main", lambda **options: calls.append(options) or True)
    out = tmp_path / "out.json"
    options = ["--method", "admm", "--sparsity", "0.7"]
    options += ["--windows", "3", "--calibration-samples", "2"]
    options += ["--device", "cpu", "--question", "Why?", "--json", str(out)]
    assert invoke("demo", *options).exit_code == 0
    assert invoke("demo").exit_code == 0
    assert calls == [
        {
            "method": "admm",
            "sparsity": 0.7,
            "windows": 3,
            "calibration_samples": 2,
            "device": "cpu",
            "question": "Why?",
            "json_path": out,
        },
        {
            "method": demo.METHOD,
            "sparsity": demo.SPARSITY,
            "windows": demo.WINDOWS,
            "calibration_samples": demo.CALIBRATION_SAMPLES,
            "device": "auto",
            "question": demo.QUESTION,
            "json_path": None,
        },
    ]


@pytest.mark.parametrize(
    "options",
    [["--sparsity", "1.5"], ["--windows", "0"], ["--calibration-samples", "0"], ["--nonsense"]],
)
def test_demo_refuses_bad_options(options):
    assert invoke("demo", *options).exit_code == 2


def test_demo_names_the_methods_that_it_knows():
    assert ", ".join(METHODS) in invoke("demo", "--help").output
    result = invoke("demo", "--method", "obs")
    assert result.exit_code == 1
    assert "flash-llm demo: method must be one of magnitude, wanda" in result.output


@pytest.mark.parametrize("error", [ImportError, RuntimeError, ValueError])
def test_demo_reports_errors_without_a_traceback(monkeypatch, error):
    def fail(**options):
        raise error("pip install this")

    monkeypatch.setattr(demo, "main", fail)
    result = invoke("demo")
    assert result.exit_code == 1
    assert "flash-llm demo: pip install this" in result.output


def test_demo_fails_when_the_packed_model_disagrees(monkeypatch):
    monkeypatch.setattr(demo, "main", lambda **options: False)
    assert invoke("demo").exit_code == 1


def pruned_checkpoint(folder):
    weight = torch.randn(256, 256).half().masked_fill_(torch.rand(256, 256) < 0.8, 0)
    folder.mkdir()
    save_file({"a.weight": weight, "b.bias": torch.ones(3)}, folder / "model.safetensors")
    return folder


def test_convert_and_inspect(tmp_path):
    source, target = pruned_checkpoint(tmp_path / "dense"), tmp_path / "packed"
    dry = invoke("convert", str(source), str(target), "--dry-run", "--json")
    assert dry.exit_code == 0 and not target.exists()
    (row,) = json.loads(dry.stdout)["rows"]
    assert row["name"] == "a" and row["decision"] == "packed" and row["shape"] == [256, 256]
    before = invoke("inspect", str(source), "--json")
    (before,) = json.loads(before.stdout)["rows"]
    assert before["decision"] == "dense" and before["packed_bytes"] == row["packed_bytes"]
    assert before["reason"] == f"would be {row['reason']}"
    done = invoke("convert", str(source), str(target), "--targets", "a", "--workers", "2")
    assert done.exit_code == 0 and "1 of 1 layers packed" in done.stdout
    after = invoke("inspect", str(target), "--json")
    (after,) = json.loads(after.stdout)["rows"]
    assert after == {**row, "reason": f"stored so: {row['reason']}"}
    assert "stored so" in invoke("inspect", str(target)).stdout


def test_inspect_does_not_say_that_packing_was_asked_for(tmp_path):
    source, target = tmp_path / "dense", tmp_path / "packed"
    source.mkdir()
    save_file({"a.weight": torch.randn(256, 256).half()}, source / "model.safetensors")
    flash_llm.convert_checkpoint(source, target, pack_unprofitable=True)
    for folder, decision, reason in [
        (source, "dense", "packing would not shrink it: 1."),
        (target, "packed", "stored so: 1."),
    ]:
        (row,) = json.loads(invoke("inspect", folder, "--json").stdout)["rows"]
        assert row["decision"] == decision and row["reason"].startswith(reason)
        assert row["reason"].endswith("x the dense bytes")


def test_tables_list_layer_2_before_layer_10(tmp_path):
    source, target = tmp_path / "dense", tmp_path / "packed"
    source.mkdir()
    names = ["head", "layers.1", "layers.2", "layers.02", "layers.10"]
    tensors = {f"{name}.weight": torch.eye(128).half() for name in names}
    save_file(tensors, source / "model.safetensors")
    ordered = ["head", "layers.1", "layers.02", "layers.2", "layers.10"]
    for command in [
        ("convert", source, target),
        ("inspect", source),
        ("inspect", target),
        ("verify", target, "--reference", source),
    ]:
        result = invoke(*command, "--json")
        rows = json.loads(result.stdout)["rows"]
        assert [row["name"].removesuffix(".weight") for row in rows] == ordered, command


def decoder_checkpoint(folder, sparsity, dtype=torch.bfloat16):
    """30 layers of two kinds, as a decoder has them, in one file."""
    folder.mkdir()
    weights = {}
    for i in range(15):
        for name, rows in (("up_proj", 128), ("down_proj", 64)):
            weight = torch.randn(rows, 128, dtype=dtype)
            weight[torch.rand(rows, 128) < sparsity] = 0
            weights[f"layers.{i}.mlp.{name}.weight"] = weight
    save_file(weights, folder / "model.safetensors")
    return folder


def test_tables_have_a_line_for_each_kind_of_layer_unless_all_are_asked_for(tmp_path):
    source, target = decoder_checkpoint(tmp_path / "dense", 0.8), tmp_path / "packed"
    for command in [
        ("convert", source, target, "--dry-run"),
        ("convert", source, target),
        ("inspect", source),
        ("inspect", target),
        ("verify", target, "--reference", source),
        ("report", target),
    ]:
        kinds = invoke(*command).stdout
        assert "layers.*.mlp.up_proj" in kinds and "layers.3.mlp" not in kinds, command
        assert len(kinds.splitlines()) < 10
        if command != ("convert", source, target):
            every = invoke(*command, "--layers").stdout
            assert "layers.3.mlp.up_proj" in every and len(every.splitlines()) > 30


@pytest.mark.parametrize(
    ("sparsity", "dtype", "reason"),
    [
        (0.0, torch.bfloat16, "packing would not shrink it (30)"),
        (0.8, torch.float32, "torch.float32 cannot be packed; for float32 pass --dtype (30)"),
    ],
)
def test_a_conversion_that_packs_nothing_says_so_in_its_last_line(
    tmp_path, sparsity, dtype, reason
):
    source = decoder_checkpoint(tmp_path / "dense", sparsity, dtype)
    result = invoke("convert", source, tmp_path / "packed")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith(f"Nothing is packed: {reason}")


def test_inspect_totals_what_is_there_and_what_packing_would_make_of_it(tmp_path):
    source, target = decoder_checkpoint(tmp_path / "dense", 0.8), tmp_path / "packed"
    last = invoke("inspect", source).stdout.splitlines()[-1]
    dense = 15 * 2 * 128 * (128 + 64)
    packed = flash_llm.convert_checkpoint(source, target).total_bytes
    assert f"{dense / 1e6:.3f} MB of dense weights take {dense / 1e6:.3f} MB (1.00x)" in last
    assert last.endswith(f"would make that {packed / 1e6:.3f} MB ({packed / dense:.2f}x)")
    assert f"take {packed / 1e6:.3f} MB" in invoke("inspect", target).stdout.splitlines()[-1]


def test_convert_and_inspect_report_errors_without_a_traceback(tmp_path):
    source, target = pruned_checkpoint(tmp_path / "dense"), tmp_path / "packed"
    for arguments, message in [
        (("convert", str(source), str(source)), f"{source} exists"),
        (("convert", str(source), str(target), "--dtype", "float64"), "dtype must be float16 or"),
        (("convert", str(source), str(target), "--targets", "no"), 'target "no" matches no'),
        (("convert", str(tmp_path), str(target)), "has neither model.safetensors nor"),
        (("inspect", str(tmp_path)), "has neither model.safetensors nor"),
        (("inspect", str(source), "--format", "csr"), "format must be"),
    ]:
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert result.output.startswith(f"flash-llm {arguments[0]}: ") and message in result.output
    assert invoke("convert", str(source)).exit_code == 2
    assert not target.exists()


def test_doctor_finds_nothing_wrong_here():
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output
    assert "checks passed" in result.output and "FAIL" not in result.output


GUIDE = (Path(__file__).resolve().parents[1] / "examples" / "README.md").read_text()


def guide_commands():
    lines = re.findall(r"^\$ (flash-llm .*)", GUIDE, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("words", guide_commands(), ids=" ".join)
def test_the_commands_of_the_guide_are_understood(words):
    command = typer.main.get_command(build_app()).commands[words[1]]
    command.make_context(words[1], words[2:])


def test_the_guide_shows_every_command_and_exit_code():
    assert {words[1] for words in guide_commands()} == set(COMMANDS)
    listed = re.findall(r"^\| (\d+) \| [a-z]", GUIDE, re.MULTILINE)
    assert listed == re.findall(r"(\d+) [a-z]", EXIT_CODES)


def registered_operators():
    """The public operators of the extension: those that are no variants of others."""
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    return {name for name in names if name.startswith("flash_llm::") and "::_" not in name}


def test_doctor_prints_json():
    diagnosis = json.loads(invoke("doctor", "--json").stdout)
    assert diagnosis["ok"] is True
    tested = {(check["device"], check["name"]) for check in diagnosis["checks"]}
    devices = {"cpu"}
    if torch.cuda.is_available() and diagnosis["facts"]["built: cuda"] == "True":
        devices |= {f"cuda:{index}" for index in range(torch.cuda.device_count())}
    expected = {(device, name) for device in devices for name in doctor._TESTS}
    assert tested == expected | {("-", "extension loads")}
    operators = {name.removeprefix("flash_llm::") for name in registered_operators()}
    quantized = {"pack_quantized", "unpack_quantized"}
    assert operators - quantized == {
        *("concat", "count_stored", "pack", "prune_pack"),
        *("slice", "spmm", "unpack", "validate"),
    }
    names = {name for _, name in tested}
    for format in FORMATS:
        assert {f"{format}: {operator}" for operator in operators - quantized} <= names
    for format in ("row_bitmap", "quantized_bitmap"):
        for kind in ops.STORED_VALUES[1:]:
            assert {f"{format}: {operator}, {kind}" for operator in quantized} <= names
    for method in METHODS:
        assert ("cpu", f"prune_: {method}") in tested
    assert "python" in diagnosis["facts"] and "CUDA toolkit" in diagnosis["facts"]


def test_doctor_fails_when_an_operator_is_wrong(monkeypatch):
    monkeypatch.setattr(
        ops, "spmm", lambda x, w, bias, activation: torch.zeros(x.shape[0], 130).to(x)
    )
    monkeypatch.setitem(
        doctor._TESTS, "grad", lambda _: doctor._expect(False, "requires_grad=True")
    )
    result = invoke("doctor")
    assert result.exit_code == 1
    for format in FORMATS:
        failed = f"FAIL  cpu     {format}: spmm: AssertionError: spmm of 1 tokens differs"
        assert failed in result.output
        assert f"ok    cpu     {format}: prune_pack" in result.output
    assert "grad: AssertionError: requires_grad=True" in result.output


def test_doctor_fails_when_the_extension_is_missing(monkeypatch):
    def missing():
        raise RuntimeError("run this command")

    monkeypatch.setattr(doctor._extension, "available", lambda: False)
    monkeypatch.setattr(doctor._extension, "require", missing)
    result = invoke("doctor", "--json")
    assert result.exit_code == 1
    (check,) = json.loads(result.stdout)["checks"]
    assert check["detail"] == "RuntimeError: run this command"


def test_doctor_finds_the_toolkit_by_cuda_home(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.9, V12.9.41\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert doctor.diagnose().facts["CUDA toolkit"] == f"12.9 ({nvcc})"


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("unpack", lambda packed: torch.zeros(packed.shape), "unpack(pack(w)) is not w"),
        ("prune_", lambda model, **_: None, "rows of 32 have [0, 0"),
    ],
)
def test_doctor_fails_when_a_step_is_wrong(monkeypatch, name, broken, message):
    monkeypatch.setattr(doctor if name == "prune_" else ops, name, broken)
    result = invoke("doctor")
    assert result.exit_code == 1 and message in result.output


def test_doctor_fails_when_validate_accepts_anything(monkeypatch):
    monkeypatch.setattr(ops.PackedWeight, "validate", lambda packed: None)
    result = invoke("doctor")
    assert result.exit_code == 1 and "validate accepted offsets in reverse" in result.output


def test_the_script_runs():
    script = Path(sys.executable).parent / "flash-llm"
    command = [str(script)] if script.exists() else SCRIPT
    done = subprocess.run(
        [*command, "doctor"], capture_output=True, text=True, timeout=120, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks passed" in done.stdout


def test_without_typer_the_script_names_the_extra():
    code = f"import sys; sys.modules['typer'] = None; {SCRIPT[-1]}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 1
    assert "needs typer, which is not installed; run: pip install 'flash-llm[demo]'" in done.stderr


# ---- Ctrl-C ----

# Converts so slowly that the signal comes in between; says when it has begun.
SLOW = """
import time
from flash_llm.io import convert
original = convert._convert_tensor
def slow(*arguments):
    print("at work", flush=True)
    time.sleep(0.3)
    return original(*arguments)
convert._convert_tensor = slow
"""


def test_ctrl_c_leaves_a_resumable_state(tmp_path):
    source, target = tmp_path / "dense", tmp_path / "packed"
    source.mkdir()
    weights = {f"l{i}.weight": torch.eye(128).half() for i in range(40)}
    save_file(weights, source / "model.safetensors")
    command = [sys.executable, "-c", SLOW + SCRIPT[-1], "convert", str(source), str(target)]
    with start(command) as process:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - begin < 40 * 0.3, "the whole file was converted first"
    partial = tmp_path / "packed.partial"
    assert errors == (
        f"flash-llm convert: interrupted; what is finished is kept in {partial}. To go on, run the "
        "same command again.\n"
    )
    assert not target.exists()
    assert {path.name for path in partial.iterdir()} == {NOTE_NAME, "model"}
    assert list((partial / "model").iterdir()) == []
    assert invoke("convert", source, target).exit_code == 0
    assert not partial.exists()
    assert invoke("verify", target, "--reference", source, "--max-error", "0").exit_code == 0


def test_ctrl_c_where_nothing_is_kept(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_run", interrupted)
    result = invoke("doctor")
    assert (result.exit_code, result.output) == (130, "flash-llm doctor: interrupted\n")


def test_an_interrupt_that_was_swallowed_comes_again(monkeypatch):
    def swallow(*_, **__):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        time.sleep(20)

    monkeypatch.setattr(interrupts, "_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(doctor, "_run", swallow)
    # A job that a shell started in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)]
        begin = time.monotonic()
        assert invoke("doctor").exit_code == 130
        assert time.monotonic() - begin < 10
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)] == handlers
    finally:
        signal.signal(signal.SIGINT, before)


# Interrupts the import of numpy, which torch imports, and swallows that as numpy does.
SWALLOWING_IMPORT = """
import signal, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "numpy":
            sys.meta_path.remove(self)
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass
sys.meta_path.insert(0, Finder())
"""


def test_ctrl_c_is_not_lost_in_an_import(tmp_path):
    folder = pruned_checkpoint(tmp_path / "dense")
    code = SWALLOWING_IMPORT + SCRIPT[-1]
    with start([sys.executable, "-c", code, "inspect", str(folder)]) as process:
        output, _ = process.communicate(timeout=60)
    # Who dies of a signal has exit code 130 in the shell.
    assert process.returncode in (130, -signal.SIGINT) and output == ""


@pytest.mark.slow
def test_ctrl_c_before_the_work_ends_the_run(tmp_path):
    source, target = decoder_checkpoint(tmp_path / "dense", 0.8), tmp_path / "packed"
    code = (
        "print('begun', flush=True)\nimport flash_llm\nprint('imported', flush=True)\n" + SCRIPT[-1]
    )
    # While torch is imported, and while the rest is; while a tensor is at work:
    # test_ctrl_c_leaves_a_resumable_state.
    for phase, delay in (("begun", 0.6), ("imported", 0)):
        with start([sys.executable, "-c", code, "convert", source, target]) as process:
            while process.stdout.readline() != f"{phase}\n":
                pass
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        # Who dies of a signal has exit code 130 in the shell.
        assert process.returncode in (130, -signal.SIGINT), errors
    assert invoke("convert", source, target).exit_code == 0
    assert invoke("verify", target, "--reference", source, "--max-error", "0").exit_code == 0


@pytest.mark.parametrize("arguments", ["convert --help", "inspect {folder} --json"])
def test_a_reader_that_has_enough_leaves_no_message(tmp_path, arguments):
    folder = pruned_checkpoint(tmp_path / "dense")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*SCRIPT, *arguments.format(folder=folder).split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# ---- bench ----


@pytest.mark.parametrize("packed", [False, True])
def test_bench_times_every_shape_once(tmp_path, quick, packed):
    tensors = {
        "a.weight": torch.randn(128, 64).bfloat16(),
        "b.weight": torch.randn(128, 64).bfloat16(),
        "c.weight": torch.randn(32, 128).bfloat16(),
        "norm.weight": torch.ones(64).bfloat16(),
        "embed_tokens.weight": torch.randn(300, 64).bfloat16(),
    }
    for name in ("a", "b", "c"):
        tensors[f"{name}.weight"].view(-1)[::2] = 0
    folder = tmp_path / "dense"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    if packed:
        assert invoke("convert", folder, tmp_path / "packed").exit_code == 0
        folder = tmp_path / "packed"
    result = invoke("bench", folder, "--device", "cpu", "--n", "8", "--n", "1", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["device"], found["dtype"]) == ("cpu", "bfloat16")
    first, second = found["shapes"]
    assert (first["shape"], first["num_layers"], first["layer"]) == ([128, 64], 2, "a")
    assert (second["shape"], second["num_layers"]) == ([32, 128], 1)
    for shape in found["shapes"]:
        assert shape["sparsity"] == 0.5 and shape["format"] == "row_bitmap"
        assert shape["stored_format"] == ("row_bitmap" if packed else "dense")
        assert shape["packed_bytes"] < shape["dense_bytes"]
        assert [product["num_tokens"] for product in shape["products"]] == [1, 8]
        assert all(p["sparse_us"] > 0 and p["dense_us"] > 0 for p in shape["products"])


def test_bench_says_when_it_times_another_format_than_the_stored_one(tmp_path, quick):
    pruned_checkpoint(tmp_path / "dense")
    invoke("convert", tmp_path / "dense", tmp_path / "packed", "--format", "bitmap")
    line = "Stored as bitmap, repacked as row_bitmap for this device."
    command = ("bench", tmp_path / "packed", "--device", "cpu", "--n", "1")
    assert line in invoke(*command).stdout.splitlines()
    (shape,) = json.loads(invoke(*command, "--json").stdout)["shapes"]
    assert (shape["stored_format"], shape["format"]) == ("bitmap", "row_bitmap")
    assert "repacked" not in invoke(*command, "--format", "bitmap").stdout
    dense = invoke("bench", tmp_path / "dense", "--device", "cpu", "--n", "1")
    assert dense.exit_code == 0 and "repacked" not in dense.stdout


def test_bench_does_not_recommend_packing_what_has_hardly_a_zero(tmp_path, quick):
    weight = torch.randn(128, 64).bfloat16()
    weight[0, 0] = 0
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    result = invoke("bench", tmp_path, "--device", "cpu", "--n", "1")
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("128x64: "))
    assert line.endswith("x the bytes, so that it stays dense")


def test_bench_prunes_dense_weights_first(tmp_path, quick):
    save_file({"a.weight": torch.randn(128, 64)}, tmp_path / "model.safetensors")
    result = invoke("bench", tmp_path, "--device", "cpu", "--n", "1", "--sparsity", "0.75")
    assert result.exit_code == 0, result.output
    assert "0.7500" in result.stdout and "128x64" in result.stdout
    assert "threads, bfloat16." in result.stdout  # what float32 is cast to


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([(1, 1, 2), (8, 1, 2)], None),
        ([(1, 1, 2), (8, 3, 2)], 8),
        ([(1, 3, 2), (8, 3, 2)], 1),
        ([(1, 3, 2), (8, 1, 2), (16, 3, 2)], 16),
        ([(1, 3, 2), (8, 1, 2)], None),
        ([(1, 2, 2)], None),
    ],
)
def test_dense_wins_from_the_last_crossover(times, expected):
    products = tuple(bench.ProductTiming(*row) for row in times)
    shape = bench.ShapeTiming("a", 1, (2, 2), 0.5, "dense", "row_bitmap", "16-bit", 8, 8, products)
    assert shape.dense_wins_from == expected
    report = bench.BenchReport("cpu", "float16", 1, (shape,))
    assert json.loads(report.to_json())["shapes"][0]["dense_wins_from"] == expected
    assert (f"dense wins from N = {expected}" in str(report)) == (expected is not None)


@pytest.mark.parametrize(
    ("tensors", "arguments", "message"),
    [
        ({"a.weight": torch.ones(4, 4)}, (), "a of .* has no zeros; pass --sparsity"),
        ({"a.bias": torch.ones(4)}, (), "has no linear layer"),
        ({"a.weight": torch.ones(4, 4).long()}, (), "a.weight must be floating point"),
        ({"a.weight": torch.eye(4)}, ("--n", "0"), r"tokens must be positive, got \[0\]"),
        ({"a.weight": torch.eye(4)}, ("--format", "csr"), "format must be"),
        ({"a.weight": torch.eye(4)}, ("--device", "tpu"), "device must be auto, cpu"),
    ],
)
def test_bench_refuses(tmp_path, quick, tensors, arguments, message):
    save_file(tensors, tmp_path / "model.safetensors")
    result = invoke("bench", tmp_path, *arguments)
    assert result.exit_code == 1
    assert re.match(f"flash-llm bench: .*{message}", result.output), result.output


def test_bench_refuses_to_prune_packed_weights(tmp_path):
    pruned_checkpoint(tmp_path / "dense")
    invoke("convert", tmp_path / "dense", tmp_path / "packed")
    result = invoke("bench", tmp_path / "packed", "--sparsity", "0.9")
    assert result.exit_code == 1 and "are packed; sparsity is for dense ones" in result.output
