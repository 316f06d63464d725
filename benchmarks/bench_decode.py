"""Decoding SmolLM2 on the CPU at batch 1, packed against dense; one JSON row per sparsity.

    python benchmarks/bench_decode.py --sparsity 0.5

The dense model in bfloat16 and in float32, and the packed one (pruned by magnitude: only how many
zeros there are changes speed), write tokens in turns. Rows go to ``benchmarks/results/cpu.jsonl``.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch
from accuracy import MODEL
from rows import RESULTS, check_row, commit_hash, cpu_name, print_table, write_rows

from flash_llm import _extension, prune_, sparsify_
from flash_llm.demo import QUESTION, greedy_decode, load_smollm2

HEADINGS = ("sparsity", "threads", "packed tok/s", "bf16 tok/s", "fp32 tok/s")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5], help="of the layers")
    parser.add_argument("--tokens", type=int, default=64, help="to write in each turn")
    parser.add_argument("--turns", type=int, default=7, help="of each model, after one to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--commit", help="default: FLASH_LLM_COMMIT, else git")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.jsonl")
    arguments = parser.parse_args(argv)
    for name in ("turns", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(arguments, name)}")
    if arguments.tokens < 2:  # the first comes with the prompt
        parser.error(f"--tokens must be at least 2, got {arguments.tokens}")
    for sparsity in arguments.sparsity:
        if not 0 <= sparsity <= 1:
            parser.error(f"--sparsity must lie in [0, 1], got {sparsity}")
    return arguments


def tokens_per_second(
    models: dict[str, torch.nn.Module], prompt: torch.Tensor, tokens: int, turns: int
) -> dict[str, float]:
    """Return the median speed of each model; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(1 + turns):
        for name, model in models.items():
            _, times = greedy_decode(model, prompt, tokens)
            if turn > 0:  # in the first, memory is allocated and kernels are chosen
                seconds[name] += times
    return {name: 1.0 / statistics.median(times) for name, times in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    commit = commit_hash(arguments.commit)
    cpu = cpu_name(Path("/proc/cpuinfo").read_text())
    model, tokenizer = load_smollm2("cpu")
    dense = model.bfloat16()
    prompt = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    lines = []
    for sparsity in arguments.sparsity:
        packed = copy.deepcopy(dense)
        prune_(packed, method="magnitude", sparsity=sparsity)
        sparsify_(packed)
        models = {"packed": packed, "bf16": dense, "fp32": copy.deepcopy(dense).float()}
        found = tokens_per_second(models, prompt, arguments.tokens, arguments.turns)
        row: dict[str, object] = {
            "bench": "decode",
            "cpu": cpu,
            "isa": _extension.require().cpu_isa(),
            "threads": arguments.threads,
            "model": MODEL,
            "sparsity": sparsity,
            "tokens_per_s": {name: round(speed, 2) for name, speed in found.items()},
            "torch": str(torch.__version__),
            "commit": commit,
        }
        check_row(row)
        write_rows(arguments.out, [row])
        lines.append(
            (f"{sparsity:g}", str(arguments.threads), *(f"{found[name]:.1f}" for name in models))
        )
    print_table(HEADINGS, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
