"""SpMM against cuBLAS, FP8 and the stream floor; one JSON row per case. See README.md here.

    python benchmarks/bench_spmm.py --shapes opt-30b.fc1 7168x7168 --sparsity 0.6 0.8 --n 8 16 32

Rows go to ``benchmarks/results/spmm-<gpu>.jsonl`` unless ``--out`` says otherwise; a new row
replaces the old row of its case. ``--device cpu`` is for trying things out: torch's dense product
replaces cuBLAS, FP8 and the floor are not measured, and no rows are written.
"""

import argparse
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fp8
import torch
import torch.nn.functional as F
from options import (
    add_device_option,
    add_row_options,
    require_device,
    require_positive,
    rows_file,
)
from rows import commit_hash, gpu_name, print_table, write_rows
from stream_floor import StreamFloor
from torch import Tensor
from weights import (
    DTYPES,
    Weight,
    add_weight_options,
    make_weight,
    parse_with_weights,
    rotated,
    weights_of,
)

import flash_llm
from flash_llm import PackedWeight
from flash_llm.ops import STORED_VALUES
from flash_llm.timing import REPLAYS, Timing, copies_to_rotate, time_cpu, time_cuda

PDL = {"both": (True, False), "on": (True,), "off": (False,)}
# Largest relative error (Frobenius norms): each output may be rounded once, by at most the unit
# roundoff. Sums in fp32 add about 1e-6, sums in 16 bits or a wrong index would show at once.
MAX_REL_ERR = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
# With X rounded. To int8: its rounding errors are uniform, and the largest of thousands of normal
# numbers is about 4 standard deviations, so steps of 4 / 127 make an error of 0.009. To e4m3, whose
# steps are an eighth of a power of two: 0.026.
MAX_ROUNDED_X_REL_ERR = {"int8": 0.02, "fp8_e4m3": 0.04}
# What kernels may round X to, by the values of the weight.
ROUNDED_X = {"int8": "int8", "fp8_e4m3": "fp8_e4m3", "int4": "int8"}

Calls = list[Callable[[], Tensor]]


def max_rel_err(dtype: str, x_values: str) -> float:
    """Return the largest relative error of a correct result."""
    return MAX_REL_ERR[dtype] if x_values == "16-bit" else MAX_ROUNDED_X_REL_ERR[x_values]


@dataclass(frozen=True)
class Case:
    """One product Y[N, M] = X[N, K] . W^T; ``pdl`` says whether weights are prefetched.

    ``values`` are those that the weight stores, ``x_values`` those that X is multiplied as.
    """

    weight: Weight
    n: int
    format: str
    config: str
    pdl: bool
    values: str = "16-bit"
    x_values: str = "16-bit"

    @property
    def x_quantization(self) -> str | None:
        """What lets kernels take X in the case's values."""
        return None if self.x_values == "16-bit" else "dynamic"

    @property
    def max_rel_err(self) -> float:
        """Largest relative error of a correct result."""
        return max_rel_err(self.weight.dtype, self.x_values)


@dataclass(frozen=True)
class Measurement:
    """What was measured of a case.

    Attributes:
        ours: our time.
        dense: cuBLAS's time.
        fp8: cuBLAS's time in FP8; None where the GPU or the shape does not support it.
        fp8_rounding: the same with the time to round X to FP8; None where not measured.
        floor: time to read the payload; None on the CPU.
        rel_err: relative error of our result, see :func:`relative_error`.
        packed_bytes: bytes of the packed weight, header and offsets included.
        plan: what ``explain_plan`` says.
    """

    ours: Timing
    dense: Timing
    fp8: Timing | None
    fp8_rounding: Timing | None
    floor: Timing | None
    rel_err: float
    packed_bytes: int
    plan: str


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x W^T``, float64 ``[N, M]``, of ``x`` [N, K] and ``weight`` [M, K]."""
    wide_x = x.double()
    exact = wide_x.new_empty(x.shape[0], weight.shape[0])
    for first in range(0, weight.shape[0], 4096):  # all of W in float64 would not fit
        part = slice(first, first + 4096)
        exact[:, part] = wide_x @ weight[part].double().T
    return exact


def relative_error(y: Tensor, exact: Tensor) -> float:
    """Return ``|y - exact| / |exact|`` in Frobenius norms."""
    difference = float((y.double() - exact).square().sum())
    reference = float(exact.square().sum())
    return (difference / reference) ** 0.5 if reference else difference**0.5


def explain(case: Case, packed: PackedWeight, device: str) -> str:
    """Return the plan that the operator takes for this case on this device."""
    hardware = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        hardware = {
            "compute_capability": 10 * properties.major + properties.minor,
            "num_sms": properties.multi_processor_count,
            "smem_per_sm_bytes": properties.shared_memory_per_multiprocessor,
        }
    w = case.weight
    return flash_llm.explain_plan(
        w.m,
        case.n,
        w.k,
        packed.nnz,
        w.dtype if case.values == "16-bit" else f"{case.values}_{w.dtype}",
        format=packed.FORMAT,  # pack may have chosen it
        config=case.config,
        x_quantization=case.x_quantization,
        **hardware,
    )


class Operands:
    """A weight on the device in every form that is timed, and the tokens of the largest N.

    Args:
        weight: which weight.
        max_n: the largest N; a smaller N uses the first of its tokens.
        formats: names of the packed formats.
        device: ``"cuda"`` or ``"cpu"``.
        real: see :func:`weights.make_weight`.
        values: that the packed weights store. The other products take the same rounded weight.

    Attributes:
        x: ``[max_n, K]``.
        exact: float64 ``[max_n, M]``, the exact product.
        dense: copies of W.
        packed: for each format copies of W, packed.
    """

    def __init__(
        self,
        weight: Weight,
        max_n: int,
        formats: Sequence[str],
        device: str,
        real: Path | None,
        values: str = "16-bit",
    ) -> None:
        self.dtype = DTYPES[weight.dtype]
        generator = torch.Generator(device=device).manual_seed(weight.k)
        x = torch.randn(max_n, weight.k, generator=generator, device=device)
        dense = make_weight(
            weight.m, weight.k, weight.sparsity, weight.mask, self.dtype, device, real
        )
        self.x = x.to(self.dtype)
        packed = {name: flash_llm.pack(dense, name, values=values) for name in formats}
        if values != "16-bit":
            dense = packed[formats[0]].to_dense()
        self.exact = exact_product(self.x, dense)
        self.packed = {name: rotated(w) for name, w in packed.items()}
        self.dense = [dense.clone() for _ in range(copies_to_rotate(dense.nbytes))]
        self._fp8: list[Tensor] = []
        if device == "cuda" and fp8.suits(weight.m, weight.k, torch.cuda.get_device_capability()):
            self._fp8_x, self._fp8_x_scale = fp8.quantise(self.x)
            self._fp8_round = torch.compile(fp8.quantise)
            values, self._fp8_scale = fp8.quantise(dense)
            self._fp8 = [values.clone() for _ in range(copies_to_rotate(values.nbytes))]

    def dense_calls(self, n: int) -> Calls:
        """Return cuBLAS's product on each copy."""
        x = self.x[:n]
        return [lambda w=w: F.linear(x, w) for w in self.dense]

    def sparse_calls(self, case: Case) -> Calls:
        """Return our product on each copy."""
        x, options = self.x[: case.n], {"config": case.config, "prefetch": case.pdl}
        options["x_quantization"] = case.x_quantization
        return [lambda w=w: flash_llm.spmm(x, w, **options) for w in self.packed[case.format]]

    def fp8_calls(self, n: int, *, rounding: bool = False) -> Calls:
        """Return the FP8 product on each copy; empty if this GPU, shape or N does not support it.

        Args:
            n: number of tokens.
            rounding: round X in each call, by what torch.compile makes of it, and not beforehand.

        Raises:
            RuntimeError: its result is wrong.
        """
        if not self._fp8:
            return []
        x, ready, scale = self.x[:n], (self._fp8_x[:n], self._fp8_x_scale), self._fp8_scale

        def call(w: Tensor) -> Tensor:
            x_values, x_scale = self._fp8_round(x) if rounding else ready
            return fp8.linear(x_values, x_scale, w, scale, self.dtype)

        calls = [lambda w=w: call(w) for w in self._fp8]
        try:
            y = calls[0]()
        except RuntimeError as error:  # cuBLAS has no kernel for this N
            print(f"no FP8 for N = {n}: {error}", file=sys.stderr)
            return []
        rel_err = relative_error(y, self.exact[:n])
        if not rel_err <= fp8.MAX_REL_ERR:
            raise RuntimeError(f"FP8, N = {n}: relative error {rel_err:.3g}")
        return calls


@dataclass(frozen=True)
class Bench:
    """How cases are measured.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        formats: names of the packed formats.
        pdl: whether weights are prefetched: one of the values of :data:`PDL`.
        config: the kernel to force, or ``"auto"``.
        replays: timed replays; see :mod:`flash_llm.timing`.
        floor: None on the CPU.
        real: file of real matrices for the mask "real".
        values: that the packed weights store.
        x_values: that X is multiplied as.
        fp8_rounding: whether the FP8 product is also timed with the rounding of its X.
    """

    device: str
    formats: Sequence[str] = ("tiled_csl",)
    pdl: Sequence[bool] = PDL["both"]
    config: str = "auto"
    replays: int = REPLAYS
    floor: StreamFloor | None = None
    real: Path | None = None
    values: str = "16-bit"
    x_values: str = "16-bit"
    fp8_rounding: bool = False

    def measure(self, weight: Weight, tokens: Sequence[int]) -> Iterator[tuple[Case, Measurement]]:
        """Check and time a weight with each N of ``tokens``.

        Raises:
            RuntimeError: a result is wrong, or not the same before and after the timing.
        """
        operands = Operands(weight, max(tokens), self.formats, self.device, self.real, self.values)
        for n in tokens:
            yield from self._measure(weight, n, operands)

    def _measure(
        self, weight: Weight, n: int, operands: Operands
    ) -> list[tuple[Case, Measurement]]:
        """Measure all contenders of one N in the same turns."""
        cases = [
            Case(weight, n, fmt, self.config, pdl, self.values, self.x_values)
            for fmt in self.formats
            for pdl in self.pdl
        ]
        ours = {case: operands.sparse_calls(case) for case in cases}
        before = {case: calls[0]() for case, calls in ours.items()}
        rel_errs = {case: relative_error(y, operands.exact[:n]) for case, y in before.items()}
        for case, rel_err in rel_errs.items():
            if not rel_err <= case.max_rel_err:  # NaN too
                raise RuntimeError(
                    f"{case}: relative error {rel_err:.3g} exceeds {case.max_rel_err:.3g}"
                )

        contenders: dict[Hashable, Sequence[Callable[[], object]]] = {
            "dense": operands.dense_calls(n),
            **ours,
        }
        if fp8_calls := operands.fp8_calls(n):
            contenders["fp8"] = fp8_calls
            if self.fp8_rounding:
                contenders["fp8 rounding"] = operands.fp8_calls(n, rounding=True)
        if self.floor is not None:
            read = self.floor.read
            for fmt, copies in operands.packed.items():
                contenders["floor", fmt] = [lambda w=w: read(w.payload) for w in copies]
        time_calls = time_cuda if self.device == "cuda" else time_cpu
        timings = time_calls(contenders, replays=self.replays)

        found = []
        for case, calls in ours.items():
            if not torch.equal(before[case], calls[-1]()):
                raise RuntimeError(
                    f"{case}: the result changed between the first call and the last"
                )
            packed = operands.packed[case.format][0]
            measurement = Measurement(
                timings[case],
                timings["dense"],
                timings.get("fp8"),
                timings.get("fp8 rounding"),
                timings.get(("floor", case.format)),
                rel_errs[case],
                packed.nbytes,
                explain(case, packed, self.device),
            )
            found.append((case, measurement))
        return found


def make_row(case: Case, found: Measurement, gpu: str, commit: str) -> dict[str, object]:
    """Return the JSON row of a measurement on a GPU."""
    assert found.floor is not None
    return {
        "bench": "spmm",
        "gpu": gpu,
        "M": case.weight.m,
        "K": case.weight.k,
        "N": case.n,
        "sparsity": case.weight.sparsity,
        "mask": case.weight.mask,
        "dtype": case.weight.dtype,
        "format": case.format,
        "values": case.values,
        "x_values": case.x_values,
        "pdl": case.pdl,
        "packed_bytes": found.packed_bytes,
        "us": round(found.ours.us, 2),
        "cublas_us": round(found.dense.us, 2),
        "fp8_us": round(found.fp8.us, 2) if found.fp8 else None,
        "fp8_rounding_us": round(found.fp8_rounding.us, 2) if found.fp8_rounding else None,
        "stream_floor_us": round(found.floor.us, 2),
        "rel_err": float(f"{found.rel_err:.3g}"),
        "plan": found.plan,
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "commit": commit,
    }


HEADINGS = (
    *("M", "K", "N", "sparsity", "mask", "dtype", "format", "values", "pdl"),
    *("us", "±%", "dense us", "x", "fp8 us", "floor us", "of floor"),
)


def table_line(case: Case, found: Measurement) -> tuple[str, ...]:
    """Return the cells under :data:`HEADINGS`; ± is the spread of our replays."""
    weight = case.weight
    return (
        str(weight.m),
        str(weight.k),
        str(case.n),
        f"{weight.sparsity:g}",
        weight.mask,
        weight.dtype,
        case.format,
        f"{case.values} x {case.x_values}",
        "on" if case.pdl else "off",
        f"{found.ours.us:.1f}",
        f"{50 * found.ours.spread:.1f}",
        f"{found.dense.us:.1f}",
        f"{found.dense.us / found.ours.us:.2f}",
        f"{found.fp8.us:.1f}" if found.fp8 else "-",
        f"{found.floor.us:.1f}" if found.floor else "-",
        f"{found.floor.us / found.ours.us:.2f}" if found.floor else "-",
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_weight_options(parser)
    parser.add_argument("--n", nargs="+", type=int, default=[8, 16, 32, 64], help="tokens")
    parser.add_argument("--format", nargs="+", default=["tiled_csl"], help="packed formats")
    parser.add_argument("--pdl", choices=list(PDL), default="both", help="prefetch of weights")
    parser.add_argument(
        "--values", choices=STORED_VALUES, default="16-bit", help="of the packed weight"
    )
    parser.add_argument(
        "--x-values", choices=("16-bit", *MAX_ROUNDED_X_REL_ERR), default="16-bit", help="of X"
    )
    parser.add_argument(
        "--fp8-rounding", action="store_true", help="time FP8 with the rounding of its X too"
    )
    parser.add_argument("--config", default="auto", help="force a kernel, see plan_names")
    add_device_option(parser)
    parser.add_argument("--replays", type=int, default=REPLAYS)
    add_row_options(parser, "spmm-<gpu>.jsonl")
    arguments = parse_with_weights(parser, argv)
    require_positive(parser, arguments, "n")
    if arguments.x_values not in ("16-bit", ROUNDED_X.get(arguments.values)):
        parser.error(
            f"--x-values {arguments.x_values} does not go with --values {arguments.values}"
        )
    require_device(parser, arguments)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = parse_arguments(argv)
    on_gpu = arguments.device == "cuda"
    commit = commit_hash(arguments.commit) if on_gpu else ""
    gpu = gpu_name(torch.cuda.get_device_name()) if on_gpu else "cpu"
    bench = Bench(
        arguments.device,
        arguments.format,
        PDL[arguments.pdl],
        arguments.config,
        arguments.replays,
        StreamFloor() if on_gpu else None,
        arguments.real,
        arguments.values,
        arguments.x_values,
        arguments.fp8_rounding,
    )
    lines = []
    with torch.inference_mode():
        for weight in weights_of(arguments):
            rows = []
            for case, found in bench.measure(weight, arguments.n):
                lines.append(table_line(case, found))
                print(f"{case} {found.plan}: {found.ours.us:.1f} us", file=sys.stderr, flush=True)
                if on_gpu:
                    rows.append(make_row(case, found, gpu, commit))
            if on_gpu:  # after each weight, so that an interrupted run keeps its rows
                write_rows(rows_file(arguments.out, gpu), rows)
    print_table(HEADINGS, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
