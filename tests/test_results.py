"""``benchmarks/RESULTS.md`` is what the rows say, and the rows say what the documents claim."""

import json
import re
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import results_page  # noqa: E402
import rows  # noqa: E402

# What rows of accuracy.jsonl must have in common for their methods to be compared.
SAME_CONDITIONS = (
    *("model", "allocation", "sparsity", "recover_epochs", "values", "rounding"),
    *("text", "nsamples", "seqlen", "seed"),
)


def test_the_results_page_is_up_to_date():
    page = results_page.PAGE.read_text()
    assert page == results_page.page(), "run: python benchmarks/results_page.py"
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (BENCHMARKS / target).exists(), target
    for drawn in rows.RESULTS.glob("*.png"):
        assert f"results/{drawn.name}" in page


def lines_of(page):
    """Table lines: their cells."""
    return [line[2:-2].split(" | ") for line in page.splitlines() if line.startswith("| ")]


def page_of(folder, **files):
    for name, of_file in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in of_file)
        (folder / f"{name.replace('_', '-')}.jsonl").write_text(lines)
    return results_page.page(folder)


def spmm_row(**changes):
    """A row of an H200 that is twice as fast as cuBLAS."""
    row = {
        **{"bench": "spmm", "gpu": "h200", "M": 7168, "K": 7168, "N": 8, "sparsity": 0.5},
        **{"mask": "uniform", "dtype": "float16", "format": "bitmap", "pdl": True},
        **{"packed_bytes": 1000, "us": 10.0, "cublas_us": 20.0, "fp8_us": 16.0},
        **{"stream_floor_us": 9.0, "rel_err": 0.0, "plan": "", "torch": "", "cuda": ""},
        "commit": "0123abcdef",
    }
    return {**row, **changes}


def serve_row(**changes):
    """A row of vLLM: the bench "serve" unless the changes say otherwise."""
    row = {
        **{"bench": "serve", "engine": "vllm 1", "gpu": "h200", "gpus": 1, "model": "toy"},
        **{"weights": "dense", "format": None, "sparsity": 0.0, "batch": 8, "prompt": 64},
        **{"new_tokens": 64, "step_ms": 6.0, "tok_per_gpu_s": 1.0, "ttft_ms": 20.0},
        **{"weights_gb": 16.0, "kv_tokens": 1, "start_s": None, "mode": "graphs"},
        **{"torch": "", "commit": "0123abcdef"},
    }
    return {**row, **changes}


def test_serving_is_compared_with_the_dense_model_of_the_same_size(tmp_path):
    half = {"weights": "flash_llm", "sparsity": 0.5, "weights_gb": 9.0}
    prompt = {"batch": 1, "prompt": 2048, "new_tokens": 3}
    kinds = {"packed": 3.0, "attention": 0.5}
    replay = {"p50": 1.0, "p99": 2.0}
    page = page_of(
        tmp_path,
        serve_h200=[
            serve_row(step_ms=4.0, **half),
            serve_row(),
            serve_row(batch=64, step_ms=3.0, **half),
            serve_row(ttft_ms=10.0, **prompt),
            serve_row(ttft_ms=8.0, **prompt, **half),
            serve_row(bench="step", kinds_ms=kinds, gaps_ms=0.5, floor_ms=2.0, **half),
            serve_row(bench="replay", rate=4.0, tpot_ms=replay, **{"ttft_ms": replay}),
            serve_row(gpus=2, step_ms=5.0, tok_per_gpu_s=0.6),
        ],
    )
    lines = lines_of(page)
    assert ["dense float16", "16.0", "6.00 (1.00)", "–"] in lines
    assert ["50 % zeros", "9.0", "4.00 (1.50)", "3.00"] in lines
    assert ["50 % zeros", "9.0", "8.00 (1.25)"] in lines
    assert ["50 % zeros", "8", "6.00", "3.00", "0.50", "0.50", "2.00"] in lines
    assert ["dense float16", "4", "1", "1.0 / 2.0", "1.0 / 2.0"] in lines
    assert ["dense float16", "16.0", "5.00 (1.00)"] in lines
    assert ["dense float16", "2", "0.6", "–"] in lines


def test_a_gpu_table_shows_each_row_in_its_cell(tmp_path):
    page = page_of(
        tmp_path,
        spmm_h200=[
            spmm_row(pdl=False, us=16.0),
            spmm_row(),
            spmm_row(sparsity=0.9, us=5.0),
            spmm_row(M=512, K=640, N=1, us=40.0, fp8_us=None),
            spmm_row(mask="rows", us=11.0),
            spmm_row(format="tiled_csl", us=8.0),
        ],
    )
    lines = lines_of(page)
    assert ["7168×7168", "8", "1.25", "2.00 / 1.25", "4.00"] in lines
    assert ["512×640", "1", "–", "0.50", "–"] in lines
    assert ["7168×7168", "8", "rows", "float16", "1.10"] in lines
    assert ["7168×7168", "8", "2.50"] in lines
    assert ["8", "2.00 … 4.00", "–"] in lines and ["1", "–", "0.50"] in lines
    assert "`0123abc`" in page and "One NVIDIA H200" in page


def test_a_machine_without_a_name_of_its_own_is_shown_too(tmp_path):
    cpu = {
        **{"bench": "cpu", "cpu": "new-cpu", "isa": "portable", "threads": 3, "M": 64, "K": 128},
        **{"N": 1, "sparsity": 0.5, "mask": "uniform", "dtype": "float16"},
        **{
            "format": "row_bitmap",
            "values": "16-bit",
            "x_values": "16-bit",
            "us": 10.0,
            "stream_floor_us": 1.0,
            "rel_err": 0.0,
        },
        **{"dense_us": {"fp32": None, "bf16": 15.0, "fp16": 25.0}, "torch": "", "commit": "9" * 40},
        "rounded_us": {"int8": 5.0, "int4": 4.0},
    }
    half = {**cpu, "M": 32, "dense_us": {"fp32": 20.0, "bf16": 15.0, "fp16": None}}
    page = page_of(tmp_path, spmm_b200=[spmm_row(gpu="b200")], cpu=[cpu, half])
    assert "### b200" in page and "### new-cpu, portable" in page and "3 threads" in page
    lines = lines_of(page)
    assert ["float16", "64×128", "1", "2.50 / 1.50"] in lines
    assert ["float16", "32×128", "1", "–"] in lines
    assert ["float16", "16-bit × 16-bit", "64×128", "1", "0.50 / 0.40"] in lines


def test_every_perplexity_is_shown():
    page = (BENCHMARKS / "RESULTS.md").read_text()
    shown = {cell for line in lines_of(page) for cell in line}
    for row in rows.read_rows(rows.RESULTS / "accuracy.jsonl"):
        assert f"{row['perplexity']:.2f}" in shown


def test_rows_of_different_conditions_do_not_share_a_table(tmp_path):
    row = {
        **{"bench": "accuracy", "model": "m", "method": "wanda", "allocation": "uniform"},
        **{"sparsity": 0.5, "recover_epochs": 0, "values": "16-bit", "rounding": None},
        **{"bits": 9.0, "perplexity": 20.0, "dense_perplexity": 10.0},
        **{"text": "t", "nsamples": 32, "seqlen": 512, "seed": 0, "seconds": 1.0, "commit": "a"},
    }
    others = [{**row, "nsamples": 8, "perplexity": 30.0}, {**row, "perplexity": 25.0, "text": "u"}]
    lines = lines_of(page_of(tmp_path, accuracy=[row, *others]))
    assert [line[2] for line in lines if line[0] == "wanda"] == ["30.00", "20.00", "25.00"]


def accuracy_rows():
    """Rows of pruned models."""
    found = rows.read_rows(rows.RESULTS / "accuracy.jsonl")
    return [row for row in found if row["bench"] == "accuracy"]


def test_accuracy_has_the_published_order():
    rows = accuracy_rows()
    compared = 0
    for row in rows:
        same = [other for other in rows if all(other[f] == row[f] for f in SAME_CONDITIONS)]
        found = {other["method"]: other["perplexity"] for other in same}
        order = [found[m] for m in ("admm", "sparsegpt", "wanda", "magnitude") if m in found]
        if row["sparsity"] >= 0.5:
            assert order == sorted(order), (row["sparsity"], row["allocation"], found)
            compared += len(order) - 1
    assert compared > 0


def test_admm_at_60_percent_is_no_worse_than_sparsegpt_at_55():
    rows = accuracy_rows()
    conditions = [field for field in SAME_CONDITIONS if field != "sparsity"]
    pairs = [
        (admm["perplexity"], other["perplexity"])
        for admm in rows
        for other in rows
        if (admm["method"], admm["sparsity"]) == ("admm", 0.6)
        and (other["method"], other["sparsity"]) == ("sparsegpt", 0.55)
        and all(admm[field] == other[field] for field in conditions)
    ]
    assert pairs and all(admm <= sparsegpt for admm, sparsegpt in pairs)
