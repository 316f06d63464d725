"""The benchmarks' own code: shapes, rows, timing in turns; a wrong result is never timed."""

import dataclasses
import functools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import accuracy  # noqa: E402
import bench_convert  # noqa: E402
import bench_cpu  # noqa: E402
import bench_decode  # noqa: E402
import bench_pack  # noqa: E402
import bench_prune  # noqa: E402
import bench_serve  # noqa: E402
import bench_spmm  # noqa: E402
import fp8  # noqa: E402
import plot_accuracy  # noqa: E402
import plot_cpu  # noqa: E402
import plot_serve  # noqa: E402
import plot_spmm  # noqa: E402
import rows  # noqa: E402
import shapes  # noqa: E402
import step_account  # noqa: E402
import stream_floor  # noqa: E402
import weights  # noqa: E402

from flash_llm import _extension, timing  # noqa: E402

WEIGHT = bench_spmm.Weight(256, 128, 0.8, "uniform", "float16")
CASE = bench_spmm.Case(WEIGHT, 8, "tiled_csl", "auto", True)
FOUND = bench_spmm.Measurement(
    ours=timing.Timing(70.123, 69.0, 71.0),
    dense=timing.Timing(96.0, 95.0, 97.0),
    fp8=timing.Timing(55.0, 54.0, 56.0),
    fp8_rounding=timing.Timing(58.0, 57.0, 59.0),
    floor=timing.Timing(38.0, 38.0, 38.0),
    rel_err=2.1e-4,
    packed_bytes=30000,
    plan="w1n8 ctas=396 (forced)",
)


PACK_CASE = bench_pack.Case(WEIGHT, "bitmap")
PACK_FOUND = bench_pack.Measurement(
    pack=timing.Timing(32.768, 32.0, 33.0),
    unpack=timing.Timing(16.0, 15.0, 17.0),
    packed_bytes=30000,
)


def fake_row(**changes):
    return {**bench_spmm.make_row(CASE, FOUND, "h200", "0123abc"), **changes}


def fake_pack_row(**changes):
    row = bench_pack.make_row(PACK_CASE, PACK_FOUND, "h200", "cuda", "0123abc")
    return {**row, **changes}


@pytest.fixture
def quick(monkeypatch):
    """Few copies and short turns: the times say nothing, but they are there."""
    monkeypatch.setattr(timing, "ROTATION_BYTES", 2**17)
    short = functools.partial(timing.time_cpu, min_seconds=0.001)
    for bench in (bench_cpu, bench_pack, bench_spmm):
        monkeypatch.setattr(bench, "time_cpu", short)


@pytest.fixture
def prefetches(monkeypatch, quick):
    """A list of what every spmm is given as `prefetch`."""
    seen = []
    spmm = bench_spmm.flash_llm.spmm

    def noted(x, w, *, prefetch, **options):
        seen.append(prefetch)
        return spmm(x, w, prefetch=prefetch, **options)

    monkeypatch.setattr(bench_spmm.flash_llm, "spmm", noted)
    return seen


def test_row_has_exactly_the_agreed_fields():
    row = fake_row()
    assert list(row) == (
        "bench gpu M K N sparsity mask dtype format values x_values pdl packed_bytes us cublas_us "
        "fp8_us fp8_rounding_us stream_floor_us rel_err plan torch cuda commit".split()
    )
    assert (row["bench"], row["M"], row["K"], row["N"]) == ("spmm", 256, 128, 8)
    assert (row["us"], row["cublas_us"]) == (70.12, 96.0)
    assert (row["fp8_us"], row["fp8_rounding_us"]) == (55.0, 58.0)
    assert (row["stream_floor_us"], row["packed_bytes"]) == (38.0, 30000)
    assert (row["format"], row["mask"], row["pdl"]) == ("tiled_csl", "uniform", True)
    assert json.loads(json.dumps(row)) == row
    without_fp8 = dataclasses.replace(FOUND, fp8=None, fp8_rounding=None)
    row = bench_spmm.make_row(CASE, without_fp8, "a100", "0123abc")
    assert row["fp8_us"] is None and row["fp8_rounding_us"] is None


def test_pack_row_has_exactly_the_agreed_fields():
    row = fake_pack_row()
    assert list(row) == (
        "bench gpu device M K sparsity mask dtype format us gb_s unpack_us packed_bytes torch cuda "
        "commit".split()
    )
    assert (row["bench"], row["gpu"], row["device"], row["M"], row["K"]) == (
        *("pack", "h200", "cuda"),
        *(256, 128),
    )
    # 256 * 128 * 2 bytes in 32.77 us.
    assert (row["us"], row["gb_s"], row["unpack_us"]) == (32.77, 2.0, 16.0)
    assert (row["format"], row["packed_bytes"]) == ("bitmap", 30000)
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    "changes",
    [
        {"us": "70"},
        {"us": 0.0},
        {"us": None},
        {"cublas_us": float("nan")},
        {"fp8_us": 0.0},
        {"fp8_us": "-"},
        {"extra": 1},
        {"M": 1.5},
        {"M": True},
        {"pdl": 1},
        {"mask": "diagonal"},
        {"packed_bytes": 0},
        {"packed_bytes": 1.0},
    ],
    ids=str,
)
def test_rows_off_the_schema_are_refused(changes):
    with pytest.raises(ValueError):
        rows.check_row(fake_row(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"gb_s": 0.0},
        {"unpack_us": None},
        {"device": None},
        {"packed_bytes": 0},
        {"N": 8},
        {"mask": "diagonal"},
        {"bench": "spmm"},
        {"bench": "unpack"},
        {"bench": None},
    ],
    ids=str,
)
def test_pack_rows_off_the_schema_are_refused(changes):
    rows.check_row(fake_pack_row())
    with pytest.raises(ValueError):
        rows.check_row(fake_pack_row(**changes))


def test_what_was_not_measured_is_null():
    rows.check_row(fake_row(fp8_us=None, packed_bytes=None))


def test_committed_rows_follow_the_schema():
    paths = list((BENCHMARKS / "results").glob("*.jsonl"))
    assert any(path.name.startswith("spmm-") for path in paths)
    for path in paths:
        found = rows.read_rows(path)
        assert found
        for row in found:
            rows.check_row(row)
            of_one_file = {
                **{"cpu": "cpu", "decode": "cpu", "accuracy": "accuracy", "rounding": "accuracy"},
                **{"convert": "pack", "prune": "pack"},
            }
            bench = "serve" if row["bench"] in ("step", "replay") else row["bench"]
            assert path.stem == (of_one_file.get(bench) or f"{bench}-{row.get('gpu')}")
            if row["bench"] in ("spmm", "cpu"):
                assert row["rel_err"] <= bench_spmm.max_rel_err(row["dtype"], row["x_values"])
        assert len({rows.case_of(row) for row in found}) == len(found)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_whole_benchmark_of_the_cpu(dtype, quick, tmp_path, capsys):
    if shutil.which("g++") is None:
        pytest.skip("the stream floor needs g++")
    out = tmp_path / "cpu.jsonl"
    arguments = ["--shapes", "64x128", "--sparsity", "0", "0.9", "--dtype", dtype, "--n", "1", "8"]
    assert bench_cpu.main([*arguments, "33", "--commit", "0123abc", "--out", str(out)]) == 0
    found = rows.read_rows(out)
    assert [(row["sparsity"], row["N"]) for row in found] == [
        (s, n) for n in (1, 8, 33) for s in (0.0, 0.9)
    ]
    isa = _extension.require().cpu_isa()
    for row in found:
        rows.check_row(row)
        assert (row["dtype"], row["format"], row["isa"]) == (dtype, "row_bitmap", isa)
        assert (row["values"], row["x_values"]) == ("16-bit", "16-bit")
        own = bench_cpu.NAME_OF[dtype]
        measured = {name for name, us in row["dense_us"].items() if us is not None}
        assert measured == ({"fp32", "bf16", "fp16"} if row["N"] <= 16 else {own})
        assert set(row["rounded_us"]) == ({"int8", "int4"} if dtype == "bfloat16" else set())
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 7 and table[0].split()[:4] == ["M", "K", "N", "sparsity"]
    with pytest.raises(ValueError, match="dense_us of bf16 must be a positive number"):
        rows.check_row({**found[0], "dense_us": {**found[0]["dense_us"], "bf16": 0.0}})
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    assert plot_cpu.main(["--dtype", dtype, "--results", str(tmp_path)]) == 0
    picture = tmp_path / f"cpu-{found[0]['cpu']}-speedup.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        plot_cpu.main(["--results", str(tmp_path / "nowhere")])


class CharTokenizer:
    """One token per character."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [ord(character) % 128 for character in text]}


@pytest.fixture
def tiny_weights(monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,  # weight-only INT4 takes groups of 64 columns
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    for bench in (accuracy, bench_decode, bench_prune):
        monkeypatch.setattr(
            bench, "load_smollm2", lambda device: (model.to(device), CharTokenizer())
        )


ACCURACY = "--nsamples 2 --seqlen 64 --windows 2 --seed 3 --commit 0123abc"


@pytest.mark.hf
def test_the_whole_benchmark_of_accuracy(tiny_weights, tmp_path, monkeypatch, capsys):
    out = tmp_path / "accuracy.jsonl"
    arguments = [*ACCURACY.split(), "--out", str(out)]
    assert accuracy.main([*arguments, "--sparsity", "0.75"]) == 0
    found = rows.read_rows(out)
    assert len(found) == 4 * 2
    for row in found:
        rows.check_row(row)
        assert row["model"] == "SmolLM2-135M-Instruct" and row["seed"] == 3
        assert row["text"] == "topics of Python's help(), held out, 2x512"
        assert row["perplexity"] != row["dense_perplexity"] == found[0]["dense_perplexity"]
    assert list(found[0]) == (
        "bench model method allocation sparsity recover_epochs values rounding bits perplexity "
        "dense_perplexity text nsamples seqlen seed seconds commit".split()
    )
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 9 and table[0].split()[:8] == (
        "method allocation sparsity epochs values rounding bits perplexity".split()
    )

    # A stopped run goes on: with one row missing, one case is measured.
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:5] + lines[6:]))
    measured = []
    measure = accuracy.Bench.measure
    monkeypatch.setattr(
        accuracy.Bench, "measure", lambda *a: (measured.append(a[1]), measure(*a))[1]
    )
    assert accuracy.main([*arguments, "--sparsity", "0.75", "--missing"]) == 0
    assert len(measured) == 1
    again = rows.read_rows(out)
    without_seconds = [[{**row, "seconds": 0.0} for row in each] for each in (found, again)]
    assert without_seconds[0] == without_seconds[1]  # the same numbers again
    with pytest.raises(ValueError, match="perplexity must be positive"):
        rows.check_row({**found[0], "perplexity": 0.0})

    # Rounding has rows of its own.
    assert accuracy.main([*arguments, "--round", "int8", "int4"]) == 0
    rounded = [row for row in rows.read_rows(out) if row["bench"] == "rounding"]
    assert [(row["values"], row["group"]) for row in rounded] == [("int4", 64), ("int8", None)]
    for row in rounded:
        rows.check_row(row)
        assert row["perplexity"] != row["dense_perplexity"] == found[0]["dense_perplexity"]
    out.write_text("".join(line for line in out.open() if '"bench": "rounding"' not in line))

    # So do rounded values; only methods that change weights can round in their sweep.
    values = ["--method", "wanda", "sparsegpt", "--allocation", "uniform"]
    values += ["--values", "int4", "int8"]
    values += ["--sparsity", "0", "0.75", "--rounding", "sweep", "nearest"]
    assert accuracy.main([*arguments, *values]) == 0
    rounded = [row for row in rows.read_rows(out) if row["values"] != "16-bit"]
    assert len(rounded) == 2 * 2 * (1 + 2)
    for row in rounded:
        rows.check_row(row)
        bits = 4 + 16 / 64 if row["values"] == "int4" else 8 + 32 / 64
        if not row["sparsity"]:
            assert row["bits"] == bits  # layers have 64 columns
        else:
            most = 1 + bits - 0.75 * (4 if row["values"] == "int4" else 8)
            assert 1 < row["bits"] <= most + 1e-3
    found_by = {(r["method"], r["sparsity"], r["values"], r["rounding"]): r for r in rounded}
    swept = found_by["sparsegpt", 0.75, "int4", "sweep"]
    assert swept["perplexity"] != found_by["sparsegpt", 0.75, "int4", "nearest"]["perplexity"]
    out.write_text("".join(line for line in out.open() if '"rounding": null' in line))

    # Recovery makes another case of it.
    recovered = ["--method", "wanda", "--allocation", "uniform", "--recover-epochs", "2"]
    assert accuracy.main([*arguments, "--sparsity", "0.75", *recovered]) == 0
    (row,) = [row for row in rows.read_rows(out) if row["recover_epochs"]]
    rows.check_row(row)
    assert (row["recover_epochs"], row["sparsity"]) == (2, 0.75)
    assert len(rows.read_rows(out)) == 9
    same = ("method", "allocation", "sparsity")
    (pruned,) = [other for other in found if all(other[f] == row[f] for f in same)]
    assert row["perplexity"] != pruned["perplexity"]

    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    assert plot_accuracy.main(["--results", str(tmp_path)]) == 0
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        plot_accuracy.main(["--results", str(tmp_path / "nowhere")])


@pytest.mark.hf
def test_the_whole_benchmark_of_decoding(tiny_weights, tmp_path, capsys):
    out = tmp_path / "cpu.jsonl"
    arguments = "--sparsity 0 0.75 --tokens 3 --turns 1 --commit 0123abc --out".split()
    assert bench_decode.main([*arguments, str(out)]) == 0
    found = rows.read_rows(out)
    assert [row["sparsity"] for row in found] == [0.0, 0.75]  # 0: the control
    for row in found:
        rows.check_row(row)
        assert set(row["tokens_per_s"]) == {"packed", "bf16", "fp32", "int8", "int4"}
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(ValueError, match="tokens_per_s of bf16 must be a positive number"):
        rows.check_row({**found[0], "tokens_per_s": {"bf16": 0.0}})
    for wrong in (["--tokens", "1"], ["--turns", "0"], ["--sparsity", "2"]):
        with pytest.raises(SystemExit):
            bench_decode.main(wrong)


@pytest.mark.hf
def test_the_whole_benchmark_of_pruning(tiny_weights, tmp_path, capsys):
    out = tmp_path / "pack.jsonl"
    arguments = "--nsamples 2 --seqlen 64 --sparsity 0.6 --commit 0123abc --out".split()
    assert bench_prune.main([*arguments, str(out)]) == 0
    found = rows.read_rows(out)
    assert {row["method"] for row in found} == {"magnitude", "wanda", "sparsegpt", "admm"}
    for row in found:
        rows.check_row(row)
        assert (row["sparsity"], row["nsamples"], row["seqlen"]) == (0.6, 2, 64)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 5 and table[0].split()[0] == "method"
    for wrong in (["--nsamples", "0"], ["--sparsity", "1.5"]):
        with pytest.raises(SystemExit):
            bench_prune.main(wrong)


def test_perplexities_are_compared_under_the_same_conditions_only(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    case = accuracy.Case("admm", "uniform", 0.5, 0, "16-bit", None, 8, 512, 0)
    bench = object.__new__(accuracy.Bench)
    bench.dense_perplexity, bench.text = 10.0, "text"
    several = [
        bench.make_row(dataclasses.replace(case, **changes), 20.0, 9.0, 1.0, "0123abc")
        for changes in (
            {"nsamples": 32},
            {},
            {"sparsity": 0.6},
            {"method": "wanda"},
            {"recover_epochs": 8},
            {"values": "int4", "rounding": "sweep"},
            {"values": "int3", "rounding": "sweep", "sparsity": 0.0},
            {"values": "int4", "rounding": "nearest"},
        )
    ]
    rows.write_rows(tmp_path / "accuracy.jsonl", several)
    plot_accuracy.main(["--results", str(tmp_path)])
    assert (tmp_path / "accuracy-bits.png").read_bytes().startswith(b"\x89PNG")
    drawn, by_bits = [], []
    monkeypatch.setattr(plot_accuracy, "draw", lambda *a: drawn.append(a))
    monkeypatch.setattr(plot_accuracy, "draw_bits", lambda *a: by_bits.append(a))
    plot_accuracy.main(["--results", str(tmp_path)])
    ((chosen, title, _),) = drawn
    ((rounded, _, _),) = by_bits
    assert len(rounded) == 5 and {row["values"] for row in rounded} == {"16-bit", "int4", "int3"}
    assert {row["nsamples"] for row in chosen} == {8} and len(chosen) == 3
    assert "8x512" in title


@pytest.mark.parametrize(
    "arguments",
    ["--nsamples 0", "--windows 0", "--sparsity 1.5", "--method obs", "--recover-epochs -1"]
    + ["--values int5", "--rounding up"],
)
def test_bad_arguments_of_the_accuracy_benchmark_are_refused(arguments):
    with pytest.raises(SystemExit):
        accuracy.main(arguments.split())


def test_a_wrong_result_on_the_cpu_is_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "ROTATION_BYTES", 2**16)
    spmm = bench_cpu.flash_llm.spmm
    monkeypatch.setattr(bench_cpu.flash_llm, "spmm", lambda x, w, **k: spmm(x, w, **k).flip(-1))
    with pytest.raises(RuntimeError, match="relative error"):
        list(bench_cpu.Bench(FakeFloor()).measure(WEIGHT, [1]))


def test_quantised_values_on_the_cpu(quick, tmp_path, capsys):
    if shutil.which("g++") is None:
        pytest.skip("the stream floor needs g++")
    out = tmp_path / "cpu.jsonl"
    arguments = ["--shapes", "64x128", "--sparsity", "0.5", "--n", "1", "--values", "int8"]
    for x_values in ("16-bit", "int8"):
        extra = ["--x-values", x_values, "--commit", "0123abc", "--out", str(out)]
        assert bench_cpu.main([*arguments, *extra]) == 0
    found = rows.read_rows(out)
    assert {(row["values"], row["x_values"]) for row in found} == {
        ("int8", "16-bit"),
        ("int8", "int8"),
    }
    assert "int8 x int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", ["--shapes 4y4", "--sparsity 1.5", "--n 0", "--x-values int8"]
)
def test_bad_arguments_of_the_cpu_benchmark_are_refused(arguments):
    with pytest.raises(SystemExit):
        bench_cpu.main(arguments.split())


def test_the_readme_of_the_benchmarks_names_every_field():
    text = (BENCHMARKS / "README.md").read_text()
    listed = re.findall(r'`\{("bench".*?)\}`', text, re.DOTALL)
    assert [re.findall(r'"(\w+)"', fields) for fields in listed] == [
        list(fields) for fields in rows.FIELDS.values()
    ]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model name\t: AMD EPYC 9654 96-Core Processor\nmodel name: x\n", "amd-epyc-9654"),
        (
            "processor: 0\nmodel name : Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz\n",
            "intel-xeon-platinum-8481c",
        ),
        ("Features: asimd\n", "cpu"),
        ("", "cpu"),
    ],
)
def test_cpu_names_become_file_names(text, name):
    assert rows.cpu_name(text) == name


def test_masks_and_prefetch_make_cases_of_their_own(tmp_path):
    path = tmp_path / "spmm-h200.jsonl"
    variants = [fake_row(mask=mask, pdl=pdl) for mask in rows.MASKS for pdl in (False, True)]
    rows.write_rows(path, variants)
    rows.write_rows(path, variants)
    assert len(rows.read_rows(path)) == len(variants)


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


def test_a_graph_holds_whole_rounds_and_long_calls_need_fewer():
    assert timing.calls_in_graph(2, 50.0) == 20
    assert timing.calls_in_graph(3, 50.0) == 21
    assert timing.calls_in_graph(50, 5.0) == 50
    assert timing.calls_in_graph(2, 1500.0) == 4
    assert timing.calls_in_graph(2, 1e6) == 2
    assert timing.calls_in_graph(2, 0.0) == 20


def make_weight(mask, sparsity=0.8, m=640, k=768, dtype=torch.float16, real=None):
    return weights.make_weight(m, k, sparsity, mask, dtype, "cpu", real)


@pytest.fixture
def real_file(tmp_path):
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(96, 36, generator=generator).bfloat16() for _ in range(5)]
    torch.save(matrices, tmp_path / "real.pt")
    return tmp_path / "real.pt"


@pytest.mark.parametrize("mask", rows.MASKS)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_masks_have_their_sparsity_and_are_the_same_each_time(mask, sparsity, real_file):
    # 300 x 260: nothing divides it, and of its 9 blocks those at the edges are small.
    for m, k, tolerance in ((640, 768, 0.02), (300, 260, 0.02 if mask != "blocks" else 0.3)):
        weight = make_weight(mask, sparsity, m, k, real=real_file)
        assert weight.shape == (m, k) and weight.dtype == torch.float16
        assert (weight == 0).double().mean() == pytest.approx(sparsity, abs=tolerance)
        assert torch.equal(weight, make_weight(mask, sparsity, m, k, real=real_file))
        values = weight[weight != 0]
        assert values.unique().numel() > values.numel() / 40  # random, in 16 bits


def test_masks_put_zeros_where_they_say(real_file):
    def of_rows(mask):
        return (make_weight(mask, 0.7, 640, 4096, real=real_file) == 0).double().mean(dim=1)

    assert of_rows("uniform").std() < 0.02
    rows_apart = of_rows("rows")
    assert rows_apart.min() < 0.45 and rows_apart.max() > 0.95
    assert rows_apart.mean() == pytest.approx(0.7, abs=0.005)
    # On the boundary of [0, 1] rows have no room to differ.
    assert bool((make_weight("rows", 0.0) != 0).double().mean() > 0.99)

    blocks = (make_weight("blocks", 0.8) != 0).view(5, 128, 6, 128).double().mean(dim=(1, 3))
    assert int((blocks > 0.99).sum()) == 6 and int((blocks == 0).sum()) == 24

    matrices = weights.real_matrices(real_file)
    tiled = weights.tile(matrices, 100, 80)
    assert torch.equal(tiled[:96, 36:72], matrices[1])
    assert torch.equal(tiled[96:, :36], matrices[3][:4])
    kept = make_weight("real", 0.7, 100, 80, real=real_file) != 0
    assert bool((kept.sum(dim=1) == 24).all())
    smallest = tiled.abs().masked_fill(~kept, torch.inf).amin(dim=1)
    assert bool((tiled.abs().masked_fill(kept, 0).amax(dim=1) <= smallest).all())


def test_an_unknown_mask_is_refused():
    with pytest.raises(ValueError, match="mask must be one of uniform"):
        make_weight("diagonal")


def test_real_matrices_are_written_to_a_file(tmp_path, monkeypatch, capsys):
    def matrices(path):
        assert path is None
        return [torch.ones(4, 8).bfloat16()[:, :2]]

    monkeypatch.setattr(weights, "real_matrices", matrices)
    path = tmp_path / "build" / "real.pt"
    assert weights.main([str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    monkeypatch.undo()
    assert torch.equal(weights.real_matrices(path)[0], torch.ones(4, 2).bfloat16())
    assert weights.main([]) == 2


def test_relative_error_sees_one_wrong_output():
    weight = make_weight("uniform", 0.5, 300, 64)
    x = torch.randn(4, 64).half()
    exact = bench_spmm.exact_product(x, weight)
    y = (x.double() @ weight.double().T).half()
    assert bench_spmm.relative_error(y, exact) < 2.0**-11
    y[2, 299] += 3
    assert bench_spmm.relative_error(y, exact) > 2.0**-11


def test_the_exact_product_is_made_in_parts():
    weight = make_weight("uniform", 0.5, 4100, 16)
    x = torch.randn(3, 16).half()
    exact = bench_spmm.exact_product(x, weight)
    assert torch.equal(exact, torch.cat([x.double() @ w.double().T for w in weight.split(4096)], 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_is_the_same_product_up_to_its_rounding(dtype):
    weight = make_weight("uniform", 0.5, 48, 64, dtype)
    x = torch.randn(5, 64).to(dtype)
    y = fp8.linear(*fp8.quantise(x), *fp8.quantise(weight), dtype)
    assert y.shape == (5, 48) and y.dtype == dtype
    assert bench_spmm.relative_error(y, bench_spmm.exact_product(x, weight)) < fp8.MAX_REL_ERR
    values, scale = fp8.quantise(torch.zeros(16, 16))
    assert bool((values.float() * scale == 0).all())


def test_fp8_suits_recent_gpus_and_multiples_of_16():
    assert fp8.suits(28672, 7168, (9, 0)) and fp8.suits(16, 16, (8, 9))
    assert not fp8.suits(28672, 7168, (8, 0))
    assert not fp8.suits(1000, 4096, (9, 0)) and not fp8.suits(1024, 4099, (9, 0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_whole_benchmark_on_the_cpu(dtype, capsys, prefetches):
    arguments = "--device cpu --shapes 256x128 --n 1 40 --sparsity 0.8 --mask uniform rows --dtype"
    assert bench_spmm.main([*arguments.split(), dtype]) == 0
    captured = capsys.readouterr()
    table = captured.out.splitlines()
    assert table[0].split()[:9] == "M K N sparsity mask dtype format values pdl".split()
    assert [line.split()[:11] for line in table[1:]] == [
        ["256", "128", n, "0.8", mask, dtype, "tiled_csl", "16-bit", "x", "16-bit", pdl]
        for mask in ("uniform", "rows")
        for n in ("1", "40")
        for pdl in ("on", "off")
    ]
    assert "cpu_tiles" in captured.err and "dense" in captured.err
    assert set(prefetches) == {True, False}


def test_quantised_values_are_compared_with_the_same_rounded_weight(capsys, quick):
    arguments = "--device cpu --shapes 256x128 --n 8 --sparsity 0.5 --format row_bitmap --pdl on"
    assert bench_spmm.main([*arguments.split(), *"--values int8 --x-values int8".split()]) == 0
    captured = capsys.readouterr()
    assert " int8 x int8 " in captured.out and "cpu_rows" in captured.err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_whole_benchmark_of_packing_on_the_cpu(dtype, quick, tmp_path, capsys):
    out = tmp_path / "results" / "pack.jsonl"
    arguments = "--device cpu --shapes 256x300 --sparsity 0.5 0.9 --mask uniform --commit test"
    arguments += f" --dtype {dtype} --out {out}"
    for _ in range(2):  # the second run replaces the rows of the first
        assert bench_pack.main(arguments.split()) == 0
    table = capsys.readouterr().out.splitlines()[:5]
    assert table[0].split()[:7] == "M K sparsity mask dtype format us".split()
    assert [line.split()[:6] for line in table[1:]] == [
        ["256", "300", sparsity, "uniform", dtype, fmt]
        for sparsity in ("0.5", "0.9")
        for fmt in ("tiled_csl", "bitmap")
    ]
    found = rows.read_rows(out)
    assert len(found) == 4
    for row in found:
        rows.check_row(row)
        assert (row["device"], row["commit"], row["dtype"]) == ("cpu", "test", dtype)
        assert row["gb_s"] == pytest.approx(256 * 300 * 2 / row["us"] / 1e3, rel=1e-2)
        assert row["packed_bytes"] < 256 * 300 * 2 * 1.1


CONVERT_ARGUMENTS = ["--gigabytes", "0.0002", "--shards", "2", "--shape", "128", "128"]


def test_the_whole_benchmark_of_converting(tmp_path, capsys):
    out = tmp_path / "pack.jsonl"
    arguments = [*CONVERT_ARGUMENTS, "--workers", "2", "--runs", "1", "--commit", "0123abc"]
    work = tmp_path / "work"
    work.mkdir()
    assert bench_convert.main([*arguments, "--folder", str(work), "--out", str(out)]) == 0
    (row,) = rows.read_rows(out)
    rows.check_row(row)
    # Three weights of 32 KiB fit into each half of 200 kB.
    assert (row["bytes"], row["shards"], row["workers"]) == (6 * 2**15, 2, 2)
    assert 0.4 < row["packed_bytes"] / row["bytes"] < 0.6
    assert row["gb_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9, rel=0.05)
    assert row["gb_s_core"] == pytest.approx(row["bytes"] / row["cpu_seconds"] / 1e9, rel=0.05)
    assert row["peak_bytes"] > 2**26  # torch's libraries alone
    assert list(work.iterdir()) == []
    assert "GB/s per core" in capsys.readouterr().out


def test_the_conversion_with_the_least_processor_time_counts(tmp_path, monkeypatch):
    found = [bench_convert.Conversion(1.0, cpu, 1, 1) for cpu in (3.0, 1.0, 2.0)]
    turns = iter(found)

    def convert(source, target, workers, threads):
        target.mkdir()
        return next(turns)

    monkeypatch.setattr(bench_convert, "convert", convert)
    assert bench_convert.measure(tmp_path, tmp_path / "packed", 1, 1, 3) == found[1]
    assert not (tmp_path / "packed").exists()


def test_a_conversion_that_fails_is_not_timed(tmp_path):
    with pytest.raises(RuntimeError, match="has neither model.safetensors nor"):
        bench_convert.convert(tmp_path, tmp_path / "packed", 1, 1)


@pytest.mark.parametrize(
    "arguments",
    [["--gigabytes", "0"], ["--workers", "0"], ["--runs", "0"], ["--shards", "-1"]],
)
def test_bad_arguments_of_the_conversion_benchmark_are_refused(arguments):
    with pytest.raises(SystemExit, match="2"):
        bench_convert.parse_arguments([*CONVERT_ARGUMENTS, *arguments])


def test_packing_that_loses_something_is_not_timed(monkeypatch):
    pack = bench_pack.flash_llm.pack
    monkeypatch.setattr(bench_pack.flash_llm, "pack", lambda w, fmt: pack(w.flip(0), fmt))
    monkeypatch.setattr(bench_pack, "time_cpu", lambda *_, **__: pytest.fail("was timed"))
    with pytest.raises(RuntimeError, match="does not give back what was packed"):
        list(bench_pack.measure(WEIGHT, ["bitmap"], "cpu"))


@pytest.mark.parametrize(("pdl", "expected"), [("on", {True}), ("off", {False})])
def test_one_kind_of_prefetch_can_be_asked_for(pdl, expected, capsys, prefetches):
    arguments = f"--device cpu --shapes 128x64 --n 2 --sparsity 0.5 --pdl {pdl}"
    assert bench_spmm.main(arguments.split()) == 0
    assert set(prefetches) == expected
    assert len(capsys.readouterr().out.splitlines()) == 2


class FakeFloor:
    def read(self, buffer):
        assert buffer.dtype == torch.int32


def test_all_formats_and_both_prefetches_share_turns_and_packing(monkeypatch, prefetches):
    packed, turns = [], []
    pack = bench_spmm.flash_llm.pack

    def named(dense, fmt, *, values):
        packed.append(fmt)
        return pack(dense, "tiled_csl")

    def time_once(contenders, *, replays):
        turns.append(list(contenders))
        return {name: timing.Timing(1.0 + i, 1.0, 9.0) for i, name in enumerate(contenders)}

    monkeypatch.setattr(bench_spmm.flash_llm, "pack", named)
    monkeypatch.setattr(bench_spmm, "time_cpu", time_once)
    bench = bench_spmm.Bench("cpu", ("tiled_csl", "bitmap"), floor=FakeFloor())
    found = dict(bench.measure(WEIGHT, [1, 2, 4]))
    assert packed == ["tiled_csl", "bitmap"]
    assert len(turns) == 3 and all(len(turn) == 1 + 4 + 2 for turn in turns)
    assert [(c.n, c.format, c.pdl) for c in found] == [
        (n, fmt, pdl) for n in (1, 2, 4) for fmt in packed for pdl in (True, False)
    ]
    for case, measurement in found.items():
        turn = turns[[1, 2, 4].index(case.n)]
        assert measurement.dense.us == 1.0 and measurement.fp8 is None
        assert measurement.ours.us == 1.0 + turn.index(case)
        assert measurement.floor.us == 1.0 + turn.index(("floor", case.format))
        bench_spmm.make_row(case, measurement, "h200", "0123abc")


def operands_with_fp8(monkeypatch):
    """As on a GPU: the operands of the CPU with what they lack for FP8."""
    monkeypatch.setattr(timing, "ROTATION_BYTES", 2**20)
    operands = bench_spmm.Operands(WEIGHT, 8, ["tiled_csl"], "cpu", None)
    operands._fp8_x, operands._fp8_x_scale = fp8.quantise(operands.x)
    values, operands._fp8_scale = fp8.quantise(operands.dense[0])
    operands._fp8 = [values, values.clone()]
    operands._fp8_round = fp8.quantise
    return operands


def test_fp8_is_checked_and_left_out_where_cublas_has_none(monkeypatch, capsys):
    operands = operands_with_fp8(monkeypatch)
    (y, again) = (call() for call in operands.fp8_calls(3))
    assert y.shape == (3, 256) and torch.equal(y, again)
    rounded = []
    monkeypatch.setattr(operands, "_fp8_round", lambda x: rounded.append(x) or fp8.quantise(x))
    rounding = operands.fp8_calls(3, rounding=True)
    rounded.clear()
    assert rounding[1]().shape == (3, 256) and len(rounded) == 1  # by each call

    monkeypatch.setattr(fp8, "linear", lambda x, *_: torch.zeros(x.shape[0], 256))
    with pytest.raises(RuntimeError, match="FP8, N = 3: relative error 1"):
        operands.fp8_calls(3)

    def unsupported(*_):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(fp8, "linear", unsupported)
    assert operands.fp8_calls(3) == []
    assert "no FP8 for N = 3: CUBLAS_STATUS_NOT_SUPPORTED" in capsys.readouterr().err


def test_a_wrong_result_ends_the_run_before_timing(monkeypatch, prefetches):
    spmm = bench_spmm.flash_llm.spmm
    monkeypatch.setattr(bench_spmm.flash_llm, "spmm", lambda x, w, **k: spmm(x, w, **k).flip(-1))
    monkeypatch.setattr(bench_spmm, "time_cpu", lambda *_, **__: pytest.fail("was timed"))
    with pytest.raises(RuntimeError, match="relative error"):
        list(bench_spmm.Bench("cpu").measure(WEIGHT, [8]))


def test_a_result_that_changes_ends_the_run(monkeypatch, prefetches):
    spmm = bench_spmm.flash_llm.spmm

    def time_and_spoil(contenders, *, replays):
        monkeypatch.setattr(bench_spmm.flash_llm, "spmm", lambda x, w, **k: -spmm(x, w, **k))
        return dict.fromkeys(contenders, timing.Timing(1.0, 1.0, 1.0))

    monkeypatch.setattr(bench_spmm, "time_cpu", time_and_spoil)
    with pytest.raises(RuntimeError, match="changed between the first call and the last"):
        list(bench_spmm.Bench("cpu").measure(WEIGHT, [8]))


@pytest.mark.parametrize(
    "arguments",
    [
        "--shapes 12y7",
        "--dtype float32",
        "--device tpu",
        "--mask diagonal",
        "--pdl maybe",
        "--values fp8_e4m3 --x-values int8",
        "--n 8 0",
        "--sparsity 1.5",
    ],
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        bench_spmm.main(["--device", "cpu", *arguments.split()])
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_pack.main(["--device", "cpu", *arguments.split()])


def test_several_values_are_taken_for_each_option():
    line = "--device cpu --shapes 128x64 256x64 --mask uniform blocks --sparsity 0.5 --n 1 2048 "
    arguments = bench_spmm.parse_arguments([*line.split(), "--format", "tiled_csl", "bitmap"])
    assert arguments.format == ["tiled_csl", "bitmap"] and arguments.n == [1, 2048]
    assert [(w.m, w.mask) for w in bench_spmm.weights_of(arguments)] == [
        (m, mask) for m in (128, 256) for mask in ("uniform", "blocks")
    ]


def test_the_best_format_is_auto_or_else_the_fastest():
    slow, fast = fake_row(us=80.0), fake_row(us=60.0, format="bitmap")
    auto, other = fake_row(us=70.0, format="auto"), fake_row(pdl=False)
    assert plot_spmm.best_rows([slow, fast, other]) == [fast, other]
    assert plot_spmm.best_rows([slow, fast, auto]) == [auto]
    assert plot_spmm.speed_up(fast) == 1.6
    assert plot_spmm.of_floor(fake_row(us=76.0)) == 0.5


@pytest.mark.parametrize("pdls", [(False,), (True, False)], ids=["one panel", "two panels"])
def test_the_plots_are_drawn_from_rows(pdls, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    cases = [
        fake_row(N=n, sparsity=s, pdl=pdl, fp8_us=None if s == 0.9 else 60.0)
        for n in (8, 16, 48)
        for s in (0.6, 0.8, 0.9)
        for pdl in pdls
    ]
    rows.write_rows(tmp_path / "spmm-h200.jsonl", [*cases, fake_row(M=7168, K=7168)])
    arguments = ["h200", "--results", str(tmp_path), "--shape", "256x128"]
    assert plot_spmm.main(arguments) == 0
    pictures = [tmp_path / f"spmm-h200-{name}.png" for name in ("speedup", "floor")]
    assert capsys.readouterr().out.split() == [str(picture) for picture in pictures]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_plotting_nothing_is_an_error(tmp_path):
    with pytest.raises(SystemExit):
        plot_spmm.main(["h200", "--results", str(tmp_path)])
    rows.write_rows(tmp_path / "spmm-h200.jsonl", [fake_row()])
    for wrong in (["--shape", "256y128"], ["--mask", "rows", "--shape", "256x128"]):
        with pytest.raises(SystemExit):
            plot_spmm.main(["h200", "--results", str(tmp_path), *wrong])


def test_requests_arrive_at_the_rate_and_are_the_same_for_all_engines():
    requests = bench_serve.spread_requests(4.0, 400)
    assert requests == bench_serve.spread_requests(4.0, 400)
    assert requests[-1].arrival == pytest.approx(100, rel=0.2)
    assert {64 <= r.prompt <= 2048 and 32 <= r.new_tokens <= 512 for r in requests} == {True}


def test_steps_count_in_which_each_request_gets_a_token():
    # The second request begins later and ends earlier; at 5.0 only the first one gets a token.
    assert bench_serve.step_times([[1.0, 2.0, 3.0, 5.0, 6.0], [2.0, 3.0, 6.0]]) == [1.0]


def test_an_account_of_a_step_counts_overlapping_kernels_once():
    kernels = [
        ("void flash_llm::bitmap_finish_kernel<C>", 30.0, 34.0),
        (
            "void flash_llm::bitmap_kernel<C>",
            10.0,
            32.0,
        ),  # dependent launch: begins before the next ends
        ("flash_fwd_splitkv", 40.0, 45.0),
        ("nvjet_hsh_64x8", 45.0, 50.0),
        ("triton_red_fused_rms_norm", 50.0, 51.0),
        ("argmax", 50.5, 50.75),  # within the other
    ]
    assert step_account.busy_times(kernels) == {
        **{"packed": 24.0, "attention": 5.0, "dense": 5.0, "norms": 1.0, "rest": 0.0}
    }


def serve_row(**changes):
    row = {
        **{"bench": "serve", "engine": "vllm 0.26.0", "gpu": "h200", "gpus": 1, "model": "toy"},
        **{"weights": "dense", "format": None, "sparsity": 0.0, "values": "16-bit"},
        **{"x_values": "16-bit"},
        **{
            "batch": 1,
            "prompt": 64,
            "new_tokens": 64,
            "step_ms": 5.0,
            "tok_per_gpu_s": 200.0,
            "ttft_ms": 20.0,
        },
        **{"weights_gb": 1.0, "kv_tokens": 1000, "start_s": 50.0, "mode": "compiled"},
        **{"torch": "2.11.0", "commit": "0123abc"},
    }
    return {**row, **changes}


def test_the_plot_of_serving_is_drawn_from_rows(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    found = [
        serve_row(batch=b, weights=w, values=v or "int8", x_values=v or "int8", mode=m, gpus=g)
        for b in (1, 8)
        for w, v in bench_serve.WEIGHTS.items()
        for m in bench_serve.MODES
        for g in (1, 2)
    ]
    for row in found:
        rows.check_row(row)
    rows.write_rows(tmp_path / "serve-h200.jsonl", found)
    assert plot_serve.main(["h200", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "serve-h200.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        plot_serve.main(["h200", "--results", str(tmp_path), "--prompt", "65"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "llama-9b"],
        ["--model", "llama-8b", "--batch", "0"],
        ["--model", "llama-8b", "--new-tokens", "2"],
        ["--model", "llama-8b", "--rate", "0"],
        ["--model", "llama-8b", "--sparsity", "1.5"],
        ["--model", "llama-8b", "--x-quantization", "dynamic"],
        ["--model", "llama-8b", "--gpus", "2", "--account", "8"],
    ],
)
def test_bad_arguments_of_the_serving_benchmark_are_refused(arguments):
    with pytest.raises(SystemExit):
        bench_serve.parse_arguments(arguments)


def test_the_floor_kernel_compiles_where_there_is_nvcc(tmp_path):
    try:
        stream_floor.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    assert stream_floor.compile_library(str(tmp_path), "sm_90").stat().st_size > 0


@pytest.mark.gpu
def test_gpu_rows_are_written_and_plausible(tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = "--shapes 1024x1024 --n 1 8 --sparsity 0.8 --mask blocks --commit test --out"
    assert bench_spmm.main([*arguments.split(), str(out)]) == 0
    found = rows.read_rows(out)
    assert [(row["N"], row["pdl"]) for row in found] == [(n, p) for n in (1, 8) for p in (0, 1)]
    for row in found:
        rows.check_row(row)
        assert (row["commit"], row["mask"]) == ("test", "blocks")
        assert (row["fp8_us"] is not None) == (torch.cuda.get_device_capability() >= (8, 9))
        # 0.8 MB of payload: no GPU reads it in less than 50 ns, none needs a millisecond.
        assert 0.05 < row["stream_floor_us"] < 1000


@pytest.mark.gpu
def test_gpu_rows_of_packing_are_written_and_plausible(tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = "--shapes 1024x1024 --sparsity 0.6 0.9 --commit test --out"
    assert bench_pack.main([*arguments.split(), str(out)]) == 0
    found = rows.read_rows(out)
    assert [(row["sparsity"], row["format"]) for row in found] == [
        (sparsity, fmt) for sparsity in (0.6, 0.9) for fmt in ("bitmap", "tiled_csl")
    ]
    for row in found:
        rows.check_row(row)
        assert row["device"] == "cuda"
        assert 0.5 < row["unpack_us"] < 1000


@pytest.mark.gpu
def test_the_floor_refuses_what_it_cannot_read():
    floor = stream_floor.StreamFloor()
    with pytest.raises(ValueError, match="16-byte"):
        floor.read(torch.zeros(5, dtype=torch.int32, device="cuda"))
