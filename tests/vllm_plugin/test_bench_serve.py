"""``benchmarks/bench_serve.py`` on a toy model: rows of each contender, in both ways."""

import concurrent.futures
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.config", reason="needs vLLM; .ci/run makes an environment for it")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_serve  # noqa: E402
import rows  # noqa: E402


class Inline(concurrent.futures.Executor):
    """Runs in this process: a new one would import vLLM again."""

    def __init__(self, max_workers, mp_context, initializer, initargs):
        pass

    def submit(self, function, *arguments):
        from vllm.distributed import cleanup_dist_env_and_memory

        future = concurrent.futures.Future()
        future.set_result(function(*arguments))
        cleanup_dist_env_and_memory()
        return future


def test_rows_of_dense_and_packed(folders, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bench_serve, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(bench_serve, "PROMPTS", (4, 16))
    monkeypatch.setattr(bench_serve, "OUTPUTS", (3, 8))
    file = tmp_path / "serve.jsonl"
    common = ["--model", str(folders["llama"] / "dense"), "--mode", "eager", "--commit", "0123abc"]
    common += ["--weights", "dense", "flash_llm", "--sparsity", "0.8", "--dtype", "bfloat16"]
    common += ["--values", "16-bit", "int8", "--x-quantization", "none", "dynamic"]
    common += ["--out", str(file)]
    sizes = ["--batch", "1", "3", "--prompt", "8", "--new-tokens", "4", "--prefill", "12"]
    assert bench_serve.main([*common, *sizes]) == 0
    assert bench_serve.main([*common, "--batch", "--rate", "50", "--requests", "5"]) == 0
    found = rows.read_rows(file)
    for row in found:
        rows.check_row(row)
    cases = {
        (row["bench"], row["values"], row["x_values"], row.get("prompt"), row.get("batch"))
        for row in found
        if row["format"] == (None if row["weights"] == "dense" else "row_bitmap")
    }
    kinds = (("16-bit", "16-bit"), ("int8", "16-bit"), ("int8", "int8"))
    assert cases == {
        case
        for kind in kinds
        for case in (
            ("serve", *kind, 8, 1),
            ("serve", *kind, 8, 3),
            ("serve", *kind, 12, 1),
            ("replay", *kind, None, None),
        )
    }
    assert len(found) == 4 * (len(kinds) + 1)
    assert len(capfd.readouterr().out.splitlines()) >= len(found)
