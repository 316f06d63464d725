"""How long pruning takes on the CPU: SmolLM2 by each method, one JSON row per method.

    python benchmarks/bench_prune.py --nsamples 32 --seqlen 512

Each method prunes a copy of the whole model in float32; its time includes calibration.
``accuracy.py`` measures how good the results are. Rows go to ``benchmarks/results/pack.jsonl``.
"""

import argparse
import copy
import sys

import torch
from accuracy import MODEL
from options import add_row_options, require_fractions, require_positive
from rows import commit_hash, cpu_name, print_table, write_rows

from flash_llm import prune_
from flash_llm.prune.methods import METHODS
from flash_llm.smollm2 import load_smollm2, pydoc_tokens

HEADINGS = ("method", "sparsity", "samples", "threads", "seconds")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of zeros")
    parser.add_argument("--nsamples", type=int, default=32, help="calibration samples")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of each sample")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_row_options(parser, "pack.jsonl")
    arguments = parser.parse_args(argv)
    require_positive(parser, arguments, "nsamples", "seqlen", "threads")
    require_fractions(parser, [arguments.sparsity])
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    commit = commit_hash(arguments.commit)
    cpu = cpu_name()
    model, tokenizer = load_smollm2("cpu")
    model = model.float()
    calibration, _ = pydoc_tokens(tokenizer, arguments.nsamples, arguments.seqlen)
    lines = []
    for method in arguments.method:
        report = prune_(
            copy.deepcopy(model),
            method=method,
            sparsity=arguments.sparsity,
            calibration=calibration,
            seqlen=arguments.seqlen,
        )
        row: dict[str, object] = {
            "bench": "prune",
            "cpu": cpu,
            "threads": arguments.threads,
            "model": MODEL,
            "method": method,
            "sparsity": arguments.sparsity,
            "nsamples": arguments.nsamples,
            "seqlen": arguments.seqlen,
            "seconds": float(f"{report.seconds:.3g}"),
            "torch": str(torch.__version__),
            "commit": commit,
        }
        write_rows(arguments.out, [row])  # after each method: an interrupted run keeps its rows
        lines.append(
            (
                *(method, f"{arguments.sparsity:g}", str(arguments.nsamples)),
                *(str(arguments.threads), f"{report.seconds:.1f}"),
            )
        )
        print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    print_table(HEADINGS, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
