"""SpMM against cuBLAS and the stream floor; one JSON row per case. See README.md in this folder.

    python benchmarks/bench_spmm.py --shapes opt-30b.fc1 7168x7168 --sparsity 0.6 0.8 --n 8 16 32

Rows go to ``benchmarks/results/spmm-<gpu>.jsonl`` unless ``--out`` says otherwise; a case that was
measured before has its row replaced. With ``--device cpu`` torch's dense product takes the place of
cuBLAS, there is no floor, and nothing is written: it serves to try things out.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rows import RESULTS, check_spmm_row, commit_hash, gpu_name, write_rows
from shapes import model_shapes, parse_shape
from stream_floor import StreamFloor
from timing import Timing, copies_to_rotate, time_cpu, time_cuda
from torch import Tensor

import flash_llm
from flash_llm import PackedWeight

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Largest relative error (Frobenius norms): each output may be rounded once, by at most the unit
# roundoff. Sums in fp32 add about 1e-6, sums in 16 bits or a wrong index would show at once.
MAX_REL_ERR = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Case:
    """One product Y[N, M] = X[N, K] . W[M, K]^T, a fraction ``sparsity`` of W being zero."""

    m: int
    k: int
    n: int
    sparsity: float
    dtype: str
    format: str
    config: str


@dataclass(frozen=True)
class Measurement:
    """What was found out about a case; ``floor`` is None on the CPU."""

    ours: Timing
    dense: Timing
    floor: Timing | None
    rel_err: float
    plan: str


def random_weight(m: int, k: int, sparsity: float, dtype: torch.dtype, device: str) -> Tensor:
    """Return a weight with zeros at random places; values never alike, so that mix-ups show."""
    generator = torch.Generator(device=device).manual_seed(m * 31 + k)
    weight = torch.randn(m, k, generator=generator, device=device, dtype=torch.float32) * 0.05
    weight *= torch.rand(m, k, generator=generator, device=device) >= sparsity
    return weight.to(dtype)


def relative_error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Return ``|y - x W^T| / |x W^T|`` in Frobenius norms, the product being in float64."""
    difference = reference = 0.0
    wide_x = x.double()
    for first in range(0, weight.shape[0], 4096):  # float64 of all of W would not fit beside it
        exact = wide_x @ weight[first : first + 4096].double().T
        difference += float((y[:, first : first + 4096].double() - exact).square().sum())
        reference += float(exact.square().sum())
    return (difference / reference) ** 0.5 if reference else difference**0.5


def explain(case: Case, nnz: int, device: str) -> str:
    """Return the plan that the operator takes for this case on this device."""
    hardware = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        hardware = {
            "compute_capability": 10 * properties.major + properties.minor,
            "num_sms": properties.multi_processor_count,
            "smem_per_sm_bytes": properties.shared_memory_per_multiprocessor,
        }
    return flash_llm.explain_plan(
        case.m, case.n, case.k, nnz, case.dtype, config=case.config, **hardware
    )


def rotated(packed: PackedWeight) -> list[PackedWeight]:
    """Return copies of a packed weight that together exceed the caches."""
    return [
        type(packed)(packed.header, packed.offsets.clone(), packed.payload.clone())
        for _ in range(copies_to_rotate(packed.nbytes))
    ]


def measure(case: Case, device: str, floor: StreamFloor | None, replays: int) -> Measurement:
    """Check and time one case; every time comes from the same turns.

    Raises:
        RuntimeError: the result is wrong, or not the same before and after the timing.
    """
    weight = random_weight(case.m, case.k, case.sparsity, DTYPES[case.dtype], device)
    x = torch.randn(
        case.n,
        case.k,
        generator=torch.Generator(device=device).manual_seed(case.n),
        device=device,
    ).to(DTYPES[case.dtype])
    packed = rotated(flash_llm.pack(weight, case.format))
    dense = [weight.clone() for _ in range(copies_to_rotate(weight.numel() * 2))]

    def ours(w: PackedWeight) -> Callable[[], Tensor]:
        return lambda: flash_llm.spmm(x, w, config=case.config)

    contenders: dict[str, list[Callable[[], object]]] = {
        "dense": [lambda w=w: F.linear(x, w) for w in dense],
        "ours": [ours(w) for w in packed],
    }
    if floor is not None:
        contenders["floor"] = [lambda w=w: floor.read(w.payload) for w in packed]

    before = ours(packed[0])()
    rel_err = relative_error(before, x, weight)
    if not rel_err <= MAX_REL_ERR[case.dtype]:  # NaN too
        bound = MAX_REL_ERR[case.dtype]
        raise RuntimeError(f"{case}: relative error {rel_err:.3g} exceeds {bound:.3g}")
    time_calls = time_cuda if device == "cuda" else time_cpu
    timings = time_calls(contenders, replays=replays)
    if not torch.equal(before, ours(packed[-1])()):
        raise RuntimeError(f"{case}: the result changed between the first call and the last")
    return Measurement(
        timings["ours"],
        timings["dense"],
        timings.get("floor"),
        rel_err,
        explain(case, packed[0].nnz, device),
    )


def make_row(case: Case, found: Measurement, gpu: str, commit: str) -> dict[str, object]:
    """Return the checked JSON row of a measurement on a GPU."""
    assert found.floor is not None
    row = {
        "bench": "spmm",
        "gpu": gpu,
        "M": case.m,
        "K": case.k,
        "N": case.n,
        "sparsity": case.sparsity,
        "dtype": case.dtype,
        "format": case.format,
        "us": round(found.ours.us, 2),
        "cublas_us": round(found.dense.us, 2),
        "stream_floor_us": round(found.floor.us, 2),
        "rel_err": float(f"{found.rel_err:.3g}"),
        "plan": found.plan,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": commit,
    }
    check_spmm_row(row)
    return row


HEADINGS = ("M", "K", "N", "sparsity", "dtype", "us", "±%", "dense us", "x", "floor us", "of floor")


def table_line(case: Case, found: Measurement) -> tuple[str, ...]:
    """Return the cells under :data:`HEADINGS`; ± is the spread of our replays."""
    floor_us = f"{found.floor.us:.1f}" if found.floor else "-"
    of_floor = f"{found.floor.us / found.ours.us:.2f}" if found.floor else "-"
    return (
        str(case.m),
        str(case.k),
        str(case.n),
        f"{case.sparsity:g}",
        case.dtype,
        f"{found.ours.us:.1f}",
        f"{50 * found.ours.spread:.1f}",
        f"{found.dense.us:.1f}",
        f"{found.dense.us / found.ours.us:.2f}",
        floor_us,
        of_floor,
    )


def print_table(lines: list[tuple[str, ...]]) -> None:
    """Print aligned columns."""
    widths = [max(len(line[i]) for line in [HEADINGS, *lines]) for i in range(len(HEADINGS))]
    for line in [HEADINGS, *lines]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def cases_of(arguments: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases that the command line asks for."""
    for text in arguments.shapes:
        for shape in model_shapes(text) or [text]:
            m, k = parse_shape(shape)
            for dtype in arguments.dtype:
                for sparsity in arguments.sparsity:
                    for n in arguments.n:
                        yield Case(m, k, n, sparsity, dtype, arguments.format, arguments.config)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["28672x7168"], help="MxK, layer or model")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--n", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float16"])
    parser.add_argument("--format", default="tiled_csl")
    parser.add_argument("--config", default="auto", help="force a kernel, see plan_names")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--replays", type=int, default=9)
    parser.add_argument("--commit", help="default: FLASH_LLM_COMMIT, else git")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/spmm-<gpu>.jsonl")
    arguments = parser.parse_args(argv)
    try:
        list(cases_of(arguments))
    except ValueError as error:
        parser.error(str(error))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --device cpu tries things out")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = parse_arguments(argv)
    on_gpu = arguments.device == "cuda"
    commit = commit_hash(arguments.commit) if on_gpu else ""
    gpu = gpu_name(torch.cuda.get_device_name()) if on_gpu else "cpu"
    floor = StreamFloor() if on_gpu else None
    out = arguments.out or RESULTS / f"spmm-{gpu}.jsonl"
    lines = []
    with torch.inference_mode():
        for case in cases_of(arguments):
            found = measure(case, arguments.device, floor, arguments.replays)
            lines.append(table_line(case, found))
            print(f"{case} {found.plan}: {found.ours.us:.1f} us", file=sys.stderr, flush=True)
            if on_gpu:  # case by case: a run that is cut short keeps what it measured
                write_rows(out, [make_row(case, found, gpu, commit)])
    print_table(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
