"""What pruning costs: perplexity of SmolLM2 after each method, one JSON row per case.

    python benchmarks/accuracy.py --sparsity 0.3 0.5 0.6 0.7 --nsamples 32

Each case prunes a copy of the dense model, recovers it for as many epochs as ``--recover-epochs``
says, and measures its perplexity on held-out text, all in float32. With ``--values int8 int4`` the
weights that stay are rounded while the model is pruned; with ``--rounding nearest``, afterwards.
Sparsity 0 only rounds. Rows go to
``benchmarks/results/accuracy.jsonl``; a new row replaces the old row of its case. With
``--missing`` cases that have a row are skipped, so that an interrupted run can continue.

    python benchmarks/accuracy.py --round int8 int4

prunes nothing. It rounds the same layers to nearest, as torch's weight-only products need them.
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from options import add_row_options, require_fractions, require_positive
from rows import case_of, commit_hash, print_table, read_rows, write_rows
from torch import Tensor, nn

from flash_llm import perplexity, prune_, recover_
from flash_llm.prune import PrunedLayer
from flash_llm.prune.calibrate import ALLOCATIONS
from flash_llm.prune.methods import METHODS
from flash_llm.quantize import GRIDS
from flash_llm.select import DEFAULT_IGNORE
from flash_llm.smollm2 import load_smollm2, pydoc_text
from flash_llm.weight_only import GROUP, WEIGHT_ONLY_VALUES, round_

MODEL = "SmolLM2-135M-Instruct"
# Tokens per window of held-out text.
WINDOW = 512
# Weights that are not rounded; they count 16 bits, though the benchmark computes in float32.
UNROUNDED = "16-bit"


@dataclass(frozen=True)
class Case:
    """One way to prune the model; with 0 ``recover_epochs`` it is not recovered.

    ``rounding`` is ``"sweep"``, ``"nearest"`` (after pruning), or None for 16-bit ``values``.
    """

    method: str
    allocation: str
    sparsity: float
    recover_epochs: int
    values: str
    rounding: str | None
    nsamples: int
    seqlen: int
    seed: int


def bits_per_weight(layers: Sequence[PrunedLayer], case: Case) -> float:
    """Bits that a pruned weight takes: a bitmap, the values that are not zero, and scales.

    Without pruning there is no bitmap, and all values are stored.
    """
    bits = 0.0
    for layer in layers:
        rows, cols = layer.shape
        stored = rows * cols * ((1 - layer.sparsity) if case.sparsity else 1)
        if case.values == UNROUNDED:
            bits += stored * 16
        else:
            grid = GRIDS[case.values]
            groups = -(-cols // (grid.group or cols))
            bits += stored * grid.bits + rows * groups * grid.scale_bits
        bits += rows * cols if case.sparsity else 0
    return bits / sum(rows * cols for rows, cols in (layer.shape for layer in layers))


class Bench:
    """The dense model and the text that it is pruned and measured with.

    Args:
        model: causal language model; each case works on a copy.
        calibration: token ids ``[T]`` to draw calibration samples from.
        heldout: token ids ``[T]`` to take the perplexity over.
        windows: number of windows of held-out text, :data:`WINDOW` tokens each.
    """

    def __init__(self, model: nn.Module, calibration: Tensor, heldout: Tensor, windows: int):
        self.model = model
        self.calibration = calibration
        self.heldout = heldout[: windows * WINDOW]
        self.text = f"topics of Python's help(), held out, {windows}x{WINDOW}"
        self.dense_perplexity = perplexity(model, self.heldout, window=WINDOW)

    def measure(self, case: Case) -> tuple[float, float, float]:
        """Prune a copy; returns its perplexity, bits per weight and the seconds that it took."""
        model = copy.deepcopy(self.model)
        whole = len(self.calibration) // case.seqlen * case.seqlen
        samples: dict[str, Any] = {
            "calibration": self.calibration[:whole].view(-1, case.seqlen),
            "nsamples": case.nsamples,
            "seqlen": case.seqlen,
            "seed": case.seed,
        }
        grid = None if case.values == UNROUNDED else case.values
        report = prune_(
            model,
            method=case.method,
            allocation=case.allocation,
            sparsity=case.sparsity,
            values=grid if case.rounding == "sweep" else None,
            **samples,
        )
        seconds = report.seconds
        if case.rounding == "nearest":
            report = prune_(model, method="magnitude", sparsity=0.0, values=grid)
            seconds += report.seconds
        if case.recover_epochs:
            epochs = case.recover_epochs
            recovery = recover_(model, self.model, epochs=epochs, values=grid, **samples)
            seconds += recovery.seconds
        quality = perplexity(model, self.heldout, window=WINDOW)
        return quality, bits_per_weight(report.layers, case), seconds

    def round(self, values: str, group: int, commit: str) -> dict[str, object]:
        """Round a copy's layers to nearest; returns the JSON row of its perplexity."""
        model = copy.deepcopy(self.model)
        layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        round_(model, [name for name in layers if name not in DEFAULT_IGNORE], values, group)
        return {
            "bench": "rounding",
            "model": MODEL,
            "values": values,
            "group": group if values == "int4" else None,
            "perplexity": round(perplexity(model, self.heldout, window=WINDOW), 3),
            "dense_perplexity": round(self.dense_perplexity, 3),
            "text": self.text,
            "commit": commit,
        }

    def make_row(
        self, case: Case, quality: float, bits: float, seconds: float, commit: str
    ) -> dict[str, object]:
        """Return the JSON row of a measurement."""
        return {
            "bench": "accuracy",
            "model": MODEL,
            "method": case.method,
            "allocation": case.allocation,
            "sparsity": case.sparsity,
            "recover_epochs": case.recover_epochs,
            "values": case.values,
            "rounding": case.rounding,
            "bits": round(bits, 3),
            "perplexity": round(quality, 3),
            "dense_perplexity": round(self.dense_perplexity, 3),
            "text": self.text,
            "nsamples": case.nsamples,
            "seqlen": case.seqlen,
            "seed": case.seed,
            "seconds": float(f"{seconds:.3g}"),
            "commit": commit,
        }


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases that the command line asks for."""
    for method, allocation, sparsity, values in itertools.product(
        arguments.method, arguments.allocation, arguments.sparsity, arguments.values
    ):
        roundings = arguments.rounding if METHODS[method].updates_weights else ["nearest"]
        for rounding in [None] if values == UNROUNDED else roundings:
            yield Case(
                *(method, allocation, sparsity, arguments.recover_epochs, values, rounding),
                *(arguments.nsamples, arguments.seqlen, arguments.seed),
            )


def is_measured(case: Case, text: str, rows: list[dict[str, object]]) -> bool:
    """Return whether a row of the case exists, of any commit."""
    wanted = {"bench": "accuracy", "model": MODEL, "text": text, **vars(case)}
    return case_of(wanted) in map(case_of, rows)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--allocation", nargs="+", choices=ALLOCATIONS, default=["uniform", "owl"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.3, 0.5, 0.6, 0.7])
    parser.add_argument("--values", nargs="+", choices=[UNROUNDED, *GRIDS], default=[UNROUNDED])
    parser.add_argument(
        "--rounding",
        nargs="+",
        choices=["sweep", "nearest"],
        default=["sweep"],
        help="of sparsegpt and admm; the other methods round to nearest",
    )
    parser.add_argument("--recover-epochs", type=int, default=0, help="of recover_; 0 for none")
    parser.add_argument(
        "--round",
        nargs="+",
        choices=WEIGHT_ONLY_VALUES,
        default=[],
        help="round the weights, prune nothing",
    )
    parser.add_argument("--group", type=int, default=GROUP, help="columns per scale of INT4")
    parser.add_argument("--nsamples", type=int, default=32, help="calibration samples")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of each sample")
    parser.add_argument("--seed", type=int, default=0, help="seed to draw the samples with")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 512 tokens")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--missing", action="store_true", help="skip cases that have a row")
    add_row_options(parser, "accuracy.jsonl")
    arguments = parser.parse_args(argv)
    require_positive(parser, arguments, "nsamples", "seqlen", "windows", "threads")
    if arguments.recover_epochs < 0:
        parser.error(f"--recover-epochs must not be negative, got {arguments.recover_epochs}")
    require_fractions(parser, arguments.sparsity)
    return arguments


HEADINGS = (
    *("method", "allocation", "sparsity", "epochs", "values", "rounding"),
    *("bits", "perplexity", "dense", "seconds"),
)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    commit = commit_hash(arguments.commit)
    model, tokenizer = load_smollm2(arguments.device)
    calibration, heldout = (
        torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in pydoc_text()
    )
    bench = Bench(model.float(), calibration, heldout, arguments.windows)
    lines = []
    for values in arguments.round:
        row = bench.round(values, arguments.group, commit)
        write_rows(arguments.out, [row])
        lines.append((values, f"{row['perplexity']:.2f}", f"{row['dense_perplexity']:.2f}"))
    if arguments.round:
        print_table(("values", "perplexity", "dense"), lines)
        return 0
    for case in cases(arguments):
        if arguments.missing and is_measured(case, bench.text, read_rows(arguments.out)):
            continue
        quality, bits, seconds = bench.measure(case)
        row = bench.make_row(case, quality, bits, seconds, commit)
        write_rows(arguments.out, [row])  # after each case: an interrupted run keeps its rows
        lines.append(
            (
                *(case.method, case.allocation, f"{case.sparsity:g}", str(case.recover_epochs)),
                *(case.values, case.rounding or "-", f"{bits:.2f}"),
                *(f"{quality:.2f}", f"{bench.dense_perplexity:.2f}", f"{seconds:.0f}"),
            )
        )
        print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    print_table(HEADINGS, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
