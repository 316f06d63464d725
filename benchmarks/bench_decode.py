"""Decoding SmolLM2 on the CPU at batch 1, packed against dense; one JSON row per sparsity.

    python benchmarks/bench_decode.py --sparsity 0 0.5

Five models generate tokens in turns: the packed one (pruned by magnitude, because only the number
of zeros affects the speed), the dense one in bfloat16 and in float32, and the dense one with the
same layers in torch's weight-only INT8 and INT4. The packed model without zeros is the control: its
gain is due to the kernel alone. Rows go to ``benchmarks/results/cpu.jsonl``.
"""

import argparse
import copy
import sys

import torch
from accuracy import MODEL
from options import add_row_options, require_fractions, require_positive
from rows import commit_hash, cpu_name, print_table, write_rows

from flash_llm import _extension, prune_, sparsify_
from flash_llm.demo import QUESTION, decoding_speeds
from flash_llm.smollm2 import load_smollm2
from flash_llm.weight_only import WEIGHT_ONLY_VALUES, quantize_

CONTENDERS = ("packed", "bf16", "fp32", *WEIGHT_ONLY_VALUES)
HEADINGS = ("sparsity", "threads", *(f"{name} tok/s" for name in CONTENDERS))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sparsity", nargs="+", type=float, default=[0.0, 0.5], help="fraction of zeros"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens per turn")
    parser.add_argument("--turns", type=int, default=7, help="per model, after one to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_row_options(parser, "cpu.jsonl")
    arguments = parser.parse_args(argv)
    require_positive(parser, arguments, "turns", "threads")
    if arguments.tokens < 2:  # the prompt's step gives the first one
        parser.error(f"--tokens must be at least 2, got {arguments.tokens}")
    require_fractions(parser, arguments.sparsity)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    commit = commit_hash(arguments.commit)
    cpu = cpu_name()
    model, tokenizer = load_smollm2("cpu")
    dense = model.bfloat16()
    prompt = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    lines = []
    for sparsity in arguments.sparsity:
        packed = copy.deepcopy(dense)
        prune_(packed, method="magnitude", sparsity=sparsity)
        report = sparsify_(packed, pack_unprofitable=True)  # without zeros nothing gets smaller
        models = {"packed": packed, "bf16": dense, "fp32": copy.deepcopy(dense).float()}
        for values in WEIGHT_ONLY_VALUES:
            models[values] = copy.deepcopy(dense)
            quantize_(models[values], [layer.name for layer in report.packed], values)
        found = decoding_speeds(models, prompt, arguments.tokens, arguments.turns)
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
        write_rows(arguments.out, [row])
        lines.append(
            (
                f"{sparsity:g}",
                str(arguments.threads),
                *(f"{found[name]:.1f}" for name in CONTENDERS),
            )
        )
    print_table(HEADINGS, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
