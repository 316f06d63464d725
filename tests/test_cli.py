"""The command line: parsing, exit codes, and the doctor behind it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from formats import FORMATS
from safetensors.torch import save_file

from flash_llm import cli, demo, doctor, ops

pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402


def invoke(*arguments):
    return CliRunner().invoke(cli.build_app(), arguments)


def test_help_lists_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "demo" in result.output and "doctor" in result.output


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(demo, "main", lambda **options: calls.append(options) or True)
    out = tmp_path / "out.json"
    options = ["--sparsity", "0.7", "--windows", "3", "--calibration-samples", "2"]
    options += ["--device", "cpu", "--question", "Why?", "--json", str(out)]
    assert invoke("demo", *options).exit_code == 0
    assert invoke("demo").exit_code == 0
    assert calls == [
        {
            "sparsity": 0.7,
            "windows": 3,
            "calibration_samples": 2,
            "device": "cpu",
            "question": "Why?",
            "json_path": out,
        },
        {
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


def test_convert_and_inspect_report_errors_without_a_traceback(tmp_path):
    source, target = pruned_checkpoint(tmp_path / "dense"), tmp_path / "packed"
    for arguments, message in [
        (("convert", str(source), str(source)), "is there already"),
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


def test_doctor_prints_json():
    diagnosis = json.loads(invoke("doctor", "--json").stdout)
    assert diagnosis["ok"] is True
    tested = {(check["device"], check["name"]) for check in diagnosis["checks"]}
    devices = {"cpu"}
    if torch.cuda.is_available() and diagnosis["facts"]["built: cuda"] == "True":
        devices |= {f"cuda:{index}" for index in range(torch.cuda.device_count())}
    expected = {(device, name) for device in devices for name in doctor._TESTS}
    assert tested == expected | {("-", "extension loads")}
    for operator in ("pack", "prune_pack", "spmm"):
        for format in FORMATS:
            assert any(name.startswith(f"{format}: {operator}") for _, name in tested)
    assert "python" in diagnosis["facts"] and "CUDA toolkit" in diagnosis["facts"]


def test_doctor_fails_when_an_operator_is_wrong(monkeypatch):
    monkeypatch.setattr(
        ops, "spmm", lambda x, w, bias, activation: torch.zeros(x.shape[0], 130).to(x)
    )
    result = invoke("doctor")
    assert result.exit_code == 1
    for format in FORMATS:
        failed = f"FAIL  cpu     {format}: spmm: AssertionError: spmm of 1 tokens differs"
        assert failed in result.output
        assert f"ok    cpu     {format}: prune_pack" in result.output


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


def test_the_script_runs():
    script = Path(sys.executable).parent / "flash-llm"
    command = (
        [str(script)]
        if script.exists()
        else [sys.executable, "-c", "import flash_llm.cli as c; c.main()"]
    )
    done = subprocess.run([*command, "doctor"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks passed" in done.stdout


def test_without_typer_the_script_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"needs typer.*pip install 'flash-llm\[demo\]'"):
        cli.main()
