"""The benchmarks' own code: shapes, rows, timing in turns; a wrong result is never timed."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_spmm  # noqa: E402
import plot_spmm  # noqa: E402
import rows  # noqa: E402
import shapes  # noqa: E402
import stream_floor  # noqa: E402
import timing  # noqa: E402

CASE = bench_spmm.Case(256, 128, 8, 0.8, "float16", "tiled_csl", "auto")


def fake_row(**changes):
    found = bench_spmm.Measurement(
        timing.Timing(70.123, 69.0, 71.0),
        timing.Timing(96.0, 95.0, 97.0),
        timing.Timing(38.0, 38.0, 38.0),
        2.1e-4,
        "w1n8 ctas=396 (forced)",
    )
    row = bench_spmm.make_row(CASE, found, "h200", "0123abc")
    return {**row, **changes}


def test_row_has_exactly_the_agreed_fields():
    row = fake_row()
    assert list(row) == (
        "bench gpu M K N sparsity dtype format us cublas_us stream_floor_us rel_err plan "
        "torch cuda commit".split()
    )
    assert (row["bench"], row["M"], row["K"], row["N"]) == ("spmm", 256, 128, 8)
    assert (row["us"], row["cublas_us"], row["stream_floor_us"]) == (70.12, 96.0, 38.0)
    assert row["format"] == "tiled_csl"
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    "changes",
    [{"us": "70"}, {"us": 0.0}, {"cublas_us": float("nan")}, {"extra": 1}, {"M": 1.5}],
    ids=str,
)
def test_rows_off_the_schema_are_refused(changes):
    with pytest.raises(ValueError):
        rows.check_spmm_row(fake_row(**changes))


def test_committed_rows_follow_the_schema():
    for path in (BENCHMARKS / "results").glob("spmm-*.jsonl"):
        found = rows.read_rows(path)
        assert found
        for row in found:
            rows.check_spmm_row(row)
            assert f"spmm-{row['gpu']}.jsonl" == path.name
            assert row["rel_err"] <= bench_spmm.MAX_REL_ERR[row["dtype"]]
        cases = [tuple(row[field] for field in rows.CASE_FIELDS) for row in found]
        assert len(set(cases)) == len(cases)


def test_a_new_row_replaces_the_old_one_of_its_case(tmp_path):
    path = tmp_path / "results" / "spmm-h200.jsonl"
    rows.write_rows(path, [fake_row(N=16), fake_row(N=8)])
    rows.write_rows(path, [fake_row(N=8, us=50.0)])
    assert [(row["N"], row["us"]) for row in rows.read_rows(path)] == [(8, 50.0), (16, 70.12)]


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
    ],
)
def test_gpu_names_become_file_names(full, short):
    assert rows.gpu_name(full) == short


def test_commit_is_the_given_one_then_the_environments_then_gits(monkeypatch):
    monkeypatch.setenv("FLASH_LLM_COMMIT", "fromenv")
    assert rows.commit_hash("given") == "given"
    assert rows.commit_hash(None) == "fromenv"
    monkeypatch.delenv("FLASH_LLM_COMMIT")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="FLASH_LLM_COMMIT"):
        rows.commit_hash(None)


def test_shapes_by_name_model_and_numbers():
    assert shapes.parse_shape("opt-30b.fc1") == (28672, 7168)
    assert shapes.parse_shape("128x64") == (128, 64)
    assert shapes.model_shapes("opt-30b") == [name for name in shapes.SHAPES if "30b" in name]
    assert shapes.model_shapes("128x64") == []
    for text in ("", "128", "128x", "x64", "0x64", "-1x64", "opt-30b", "1x2x3"):
        with pytest.raises(ValueError, match="shape must be MxK"):
            shapes.parse_shape(text)


def test_copies_exceed_the_rotation():
    for num_bytes in (1, 2**20, 100 * 2**20, 255 * 2**20, 2**30):
        copies = timing.copies_to_rotate(num_bytes)
        assert copies >= 2
        assert copies * num_bytes > timing.ROTATION_BYTES


def test_contenders_take_turns_and_each_copy_is_used_alike():
    seen = []
    contenders = {
        "a": [lambda i=i: seen.append(("a", i)) for i in range(3)],
        "b": [lambda: seen.append(("b", 0))],
    }
    found = timing.time_cpu(contenders, replays=7, min_seconds=0.0)
    assert set(found) == {"a", "b"}
    assert all(t.min_us <= t.us <= t.max_us for t in found.values())
    turn = [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    assert seen[-7 * len(turn) :] == turn * 7


@pytest.mark.parametrize("time_calls", [timing.time_cpu, timing.time_cuda])
def test_too_few_replays_and_empty_contenders_are_refused(time_calls):
    with pytest.raises(ValueError, match="at least 7"):
        time_calls({"a": [lambda: None]}, replays=6)
    with pytest.raises(ValueError, match="b has no calls"):
        time_calls({"a": [lambda: None], "b": []})


def test_relative_error_sees_one_wrong_output():
    weight = bench_spmm.random_weight(300, 64, 0.5, torch.float16, "cpu")
    x = torch.randn(4, 64).half()
    y = (x.double() @ weight.double().T).half()
    assert bench_spmm.relative_error(y, x, weight) < 2.0**-11
    y[2, 299] += 3
    assert bench_spmm.relative_error(y, x, weight) > 2.0**-11


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_whole_benchmark_on_the_cpu(dtype, capsys, monkeypatch):
    monkeypatch.setattr(timing, "ROTATION_BYTES", 2**20)
    arguments = "--device cpu --shapes 256x128 --n 1 40 --sparsity 0.8 --replays 7 --dtype"
    assert bench_spmm.main([*arguments.split(), dtype]) == 0
    captured = capsys.readouterr()
    table = captured.out.splitlines()
    assert table[0].split()[:5] == ["M", "K", "N", "sparsity", "dtype"]
    assert [line.split()[:5] for line in table[1:]] == [
        ["256", "128", n, "0.8", dtype] for n in ("1", "40")
    ]
    assert "cpu_tiles" in captured.err and "dense" in captured.err


def test_a_wrong_result_ends_the_run_before_timing(monkeypatch):
    monkeypatch.setattr(timing, "ROTATION_BYTES", 2**20)
    spmm = bench_spmm.flash_llm.spmm
    monkeypatch.setattr(bench_spmm.flash_llm, "spmm", lambda x, w, **k: spmm(x, w, **k).flip(-1))
    monkeypatch.setattr(bench_spmm, "time_cpu", lambda *_, **__: pytest.fail("was timed"))
    with pytest.raises(RuntimeError, match="relative error"):
        bench_spmm.measure(CASE, "cpu", None, 7)


@pytest.mark.parametrize("arguments", ["--shapes 12y7", "--dtype float32", "--device tpu"])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        bench_spmm.main(["--device", "cpu", *arguments.split()])
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_plot_is_drawn_from_rows(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    cases = [fake_row(N=n, sparsity=s) for n in (8, 16) for s in (0.6, 0.8)]
    rows.write_rows(tmp_path / "spmm-h200.jsonl", [*cases, fake_row(M=7168, K=7168)])
    assert plot_spmm.main(["h200", "--results", str(tmp_path)]) == 0
    picture = tmp_path / "spmm-h200.png"
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plotting_nothing_is_an_error(tmp_path):
    with pytest.raises(SystemExit):
        plot_spmm.main(["h200", "--results", str(tmp_path)])


def test_the_floor_kernel_compiles_where_there_is_nvcc(tmp_path):
    try:
        stream_floor.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    assert stream_floor.compile_library(str(tmp_path), "sm_90").stat().st_size > 0


@pytest.mark.gpu
def test_gpu_rows_are_written_and_plausible(tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = "--shapes 1024x1024 --n 8 --sparsity 0.8 --commit test --out"
    assert bench_spmm.main([*arguments.split(), str(out)]) == 0
    (row,) = rows.read_rows(out)
    rows.check_spmm_row(row)
    assert row["commit"] == "test"
    # 0.8 MB of payload: no GPU reads it in less than 50 ns, none needs a millisecond.
    assert 0.05 < row["stream_floor_us"] < 1000


@pytest.mark.gpu
def test_the_floor_refuses_what_it_cannot_read():
    floor = stream_floor.StreamFloor()
    with pytest.raises(ValueError, match="16-byte"):
        floor.read(torch.zeros(5, dtype=torch.int32, device="cuda"))
