"""SpMM on the CPU against torch's dense products and the stream floor; one JSON row per case.

    python benchmarks/bench_cpu.py --shapes llama-8b 576x576 --n 1 8 --dtype bfloat16

The dense products are ``F.linear`` in float32, bfloat16 and float16, the fastest of which a user
would choose, and torch's weight-only INT8 and INT4 products, which round the weight. Sparsity 0 is
the control: its gain is due to the kernel alone. ``--values int8`` packs int8 values, and
``--x-values int8`` lets our kernel round X too. All contenders take turns, and each rotates over
copies of its weight that together exceed the caches. Rows go to ``benchmarks/results/cpu.jsonl``;
a new row replaces the old row of its case.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_spmm import exact_product, max_rel_err, relative_error
from options import add_row_options, require_positive
from rows import commit_hash, cpu_name, print_table, write_rows
from stream_floor_cpu import CpuStreamFloor
from torch import Tensor
from weights import DTYPES, Weight, add_weight_options, make_weight, parse_with_weights, weights_of

import flash_llm
from flash_llm import _extension
from flash_llm.ops import STORED_VALUES
from flash_llm.timing import REPLAYS, Timing, copies_to_rotate, time_cpu
from flash_llm.weight_only import GROUP, WEIGHT_ONLY_VALUES, WeightOnlyLinear

DENSE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The key in DENSE of a weight's dtype.
NAME_OF = {"bfloat16": "bf16", "float16": "fp16"}
FORMAT = "row_bitmap"
# Columns of an INT4 weight that share a scale, where it divides K.
INT4_GROUP = 128


@dataclass(frozen=True)
class Case:
    """One product Y[N, M] = X[N, K] . W^T."""

    weight: Weight
    n: int
    config: str
    values: str = "16-bit"
    x_values: str = "16-bit"

    @property
    def max_rel_err(self) -> float:
        """The largest relative error of a correct result."""
        return max_rel_err(self.weight.dtype, self.x_values)


@dataclass(frozen=True)
class Measurement:
    """What was measured of a case.

    Attributes:
        ours: our time.
        dense: torch's times, by the names of :data:`DENSE`.
        rounded: times of torch's weight-only products, by the names of
            :data:`WEIGHT_ONLY_VALUES`; empty for float16.
        floor: time to read the payload.
        rel_err: relative error of our result.
        isa: instruction set of our kernel.
    """

    ours: Timing
    dense: dict[str, Timing]
    rounded: dict[str, Timing]
    floor: Timing
    rel_err: float
    isa: str


# Above this many tokens two copies are enough, because reading the weight takes little of the time.
MANY_TOKENS = 16


class Operands:
    """A weight in every form that is timed, and the tokens of the largest N.

    Packed copies are packed one by one: clones would not have the huge pages that packing asks for.

    Args:
        weight: which weight.
        max_n: the largest N; a smaller N uses the first of its tokens.
        real: see :func:`weights.make_weight`.
        values: that the packed weights store. The dense products take the same rounded weight.
    """

    def __init__(
        self, weight: Weight, max_n: int, real: Path | None, values: str = "16-bit"
    ) -> None:
        dtype = DTYPES[weight.dtype]
        generator = torch.Generator().manual_seed(weight.k)
        dense = make_weight(weight.m, weight.k, weight.sparsity, weight.mask, dtype, "cpu", real)
        self.x = torch.randn(max_n, weight.k, generator=generator).to(dtype)
        first = flash_llm.pack(dense, FORMAT, values=values)
        others = copies_to_rotate(first.nbytes) - 1
        more = (flash_llm.pack(dense, FORMAT, values=values) for _ in range(others))
        self.packed = [first, *more]
        dense = first.to_dense()
        self.exact = exact_product(self.x, dense)
        self.dense = {}
        for name, to in DENSE.items():
            copies = copies_to_rotate(dense.numel() * to.itemsize)
            self.dense[name] = [dense.to(to, copy=True) for _ in range(copies)]
        self.rounded = {}
        group = INT4_GROUP if weight.k % INT4_GROUP == 0 else GROUP
        for name in WEIGHT_ONLY_VALUES if dtype == torch.bfloat16 else ():
            one = WeightOnlyLinear(dense, None, name, group)
            copies = copies_to_rotate(one.weight.nbytes + one.scales.nbytes)
            self.rounded[name] = [copy.deepcopy(one) for _ in range(copies)]

    def dense_calls(self, name: str, n: int) -> list[Callable[[], Tensor]]:
        """Return torch's product in one dtype, on each copy."""
        x = self.x[:n].to(DENSE[name])
        return [lambda w=w: F.linear(x, w) for w in self.dense[name]]

    def rounded_calls(self, name: str, n: int) -> list[Callable[[], Tensor]]:
        """Return torch's weight-only product on each copy."""
        x = self.x[:n]
        return [lambda layer=layer: layer(x) for layer in self.rounded[name]]

    def sparse_calls(self, case: Case) -> list[Callable[[], Tensor]]:
        """Return our product on each copy."""
        x, options = self.x[: case.n], {"config": case.config}
        if case.x_values == "int8":
            options["x_quantization"] = "dynamic"
        return [lambda w=w: flash_llm.spmm(x, w, **options) for w in self.packed]


@dataclass(frozen=True)
class Bench:
    """How cases are measured.

    Attributes:
        floor: reads the payload.
        config: the kernel to force, or ``"auto"``.
        dense: names of the dense dtypes to time above :data:`MANY_TOKENS` tokens besides the
            weight's own; up to that number all are timed.
        replays: timed turns; see :mod:`flash_llm.timing`.
        real: file of real matrices for the mask "real".
        values: that the packed weights store.
        x_values: that X is multiplied as.
    """

    floor: CpuStreamFloor
    config: str = "auto"
    dense: Sequence[str] = ()
    replays: int = REPLAYS
    real: Path | None = None
    values: str = "16-bit"
    x_values: str = "16-bit"

    def measure(self, weight: Weight, tokens: Sequence[int]) -> Iterator[tuple[Case, Measurement]]:
        """Check and time a weight with each N of ``tokens``.

        Raises:
            RuntimeError: a result is wrong.
        """
        operands = Operands(weight, max(tokens), self.real, self.values)
        for n in tokens:
            case = Case(weight, n, self.config, self.values, self.x_values)
            ours = operands.sparse_calls(case)
            rel_err = relative_error(ours[0](), operands.exact[:n])
            if not rel_err <= case.max_rel_err:  # NaN too
                raise RuntimeError(f"{case}: relative error {rel_err:.3g}")
            names = list(DENSE) if n <= MANY_TOKENS else [*self.dense, NAME_OF[weight.dtype]]
            contenders: dict[Hashable, Sequence[Callable[[], object]]] = {
                "ours": ours,
                **{name: operands.dense_calls(name, n) for name in names},
                **{name: operands.rounded_calls(name, n) for name in operands.rounded},
                "floor": [lambda w=w: self.floor.read(w.payload) for w in operands.packed],
            }
            if n > MANY_TOKENS:
                contenders = {name: calls[:2] for name, calls in contenders.items()}
            timings = time_cpu(contenders, replays=self.replays)
            dense = {name: timings[name] for name in DENSE if name in timings}
            rounded = {name: timings[name] for name in operands.rounded}
            isa = _extension.require().cpu_isa()
            floor = timings["floor"]
            yield case, Measurement(timings["ours"], dense, rounded, floor, rel_err, isa)


def make_row(case: Case, found: Measurement, cpu: str, commit: str) -> dict[str, object]:
    """Return the JSON row of a measurement."""
    return {
        "bench": "cpu",
        "cpu": cpu,
        "isa": found.isa,
        "threads": torch.get_num_threads(),
        "M": case.weight.m,
        "K": case.weight.k,
        "N": case.n,
        "sparsity": case.weight.sparsity,
        "mask": case.weight.mask,
        "dtype": case.weight.dtype,
        "format": FORMAT,
        "values": case.values,
        "x_values": case.x_values,
        "us": round(found.ours.us, 2),
        "dense_us": {
            name: round(found.dense[name].us, 2) if name in found.dense else None for name in DENSE
        },
        "rounded_us": {name: round(timing.us, 2) for name, timing in found.rounded.items()},
        "stream_floor_us": round(found.floor.us, 2),
        "rel_err": float(f"{found.rel_err:.3g}"),
        "torch": str(torch.__version__),
        "commit": commit,
    }


HEADINGS = (
    *("M", "K", "N", "sparsity", "dtype", "values", "us", "±%"),
    *(f"{name} us" for name in (*DENSE, *WEIGHT_ONLY_VALUES)),
    *("x own", "x fastest", "of floor"),
)


def table_line(case: Case, found: Measurement) -> tuple[str, ...]:
    """Return the cells under :data:`HEADINGS`; ± is the spread of our turns."""
    ours, own = found.ours.us, found.dense[NAME_OF[case.weight.dtype]].us
    times = found.dense | found.rounded
    return (
        *(str(case.weight.m), str(case.weight.k), str(case.n), f"{case.weight.sparsity:g}"),
        *(case.weight.dtype, f"{case.values} x {case.x_values}"),
        *(f"{ours:.1f}", f"{50 * found.ours.spread:.0f}"),
        *(
            f"{times[name].us:.1f}" if name in times else "-"
            for name in (*DENSE, *WEIGHT_ONLY_VALUES)
        ),
        f"{own / ours:.2f}",
        f"{min(dense.us for dense in found.dense.values()) / ours:.2f}",
        f"{found.floor.us / ours:.2f}",
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_weight_options(parser)
    parser.set_defaults(
        shapes=["llama-8b", "576x576", "1536x576", "576x1536"],
        dtype=["bfloat16"],
        sparsity=[0.0, *parser.get_default("sparsity")],  # 0: the control
    )
    parser.add_argument("--n", nargs="+", type=int, default=[1, 8], help="tokens")
    parser.add_argument("--config", default="auto", help="force a kernel, see plan_names")
    parser.add_argument(
        "--values", choices=STORED_VALUES, default="16-bit", help="of the packed weight"
    )
    parser.add_argument("--x-values", choices=("16-bit", "int8"), default="16-bit", help="of X")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--dense", nargs="+", choices=list(DENSE), default=[], help="also above 16 tokens"
    )
    parser.add_argument("--replays", type=int, default=REPLAYS)
    add_row_options(parser, "cpu.jsonl")
    arguments = parse_with_weights(parser, argv)
    require_positive(parser, arguments, "n")
    if arguments.x_values == "int8" and (
        arguments.values == "16-bit" or arguments.config != "auto"
    ):
        parser.error("--x-values int8 needs --values int8 and --config auto")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    commit = commit_hash(arguments.commit)
    cpu = cpu_name()
    bench = Bench(
        CpuStreamFloor(),
        arguments.config,
        arguments.dense,
        arguments.replays,
        arguments.real,
        arguments.values,
        arguments.x_values,
    )
    lines = []
    with torch.inference_mode():
        for weight in weights_of(arguments):
            rows = []
            for case, found in bench.measure(weight, arguments.n):
                lines.append(table_line(case, found))
                print(" ".join(lines[-1]), file=sys.stderr, flush=True)
                rows.append(make_row(case, found, cpu, commit))
            if arguments.config == "auto":  # after each weight: an interrupted run keeps its rows
                write_rows(arguments.out, rows)
    print_table(HEADINGS, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
