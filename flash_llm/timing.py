"""Time measurement for all benchmarks: those in ``benchmarks`` and ``flash-llm bench``.

On CUDA the calls are captured in one graph, so that Python and launches are not measured. The calls
rotate through copies of the weights that exceed L2, so that weights are read from memory, as in a
model. Whole graphs are replayed between two events. Contenders are replayed in turns, so that
clocks and temperature are the same for all. The result is the median over the turns.

On the CPU the same turns and median are measured with a wall clock.
"""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

# The least size of all copies: five times the L2 of an H100, four times that of an H200.
ROTATION_BYTES = 256 * 2**20
# A graph has at least this many calls, or lasts this long: the cost of the two events and of the
# graph's start is divided by its calls.
MIN_CALLS = 20
LONG_GRAPH_US = 5000.0
REPLAYS = 7
WARM_UP_REPLAYS = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over the replays.

    Attributes:
        us: the median.
        min_us: the fastest replay.
        max_us: the slowest replay.
    """

    us: float
    min_us: float
    max_us: float

    @property
    def spread(self) -> float:
        """Slowest minus fastest replay, as a fraction of the median."""
        return (self.max_us - self.min_us) / self.us if self.us else 0.0

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> "Timing":
        """Return median and extremes of the samples of one contender."""
        return cls(statistics.median(samples_us), min(samples_us), max(samples_us))


def calls_in_graph(num_copies: int, call_us: float) -> int:
    """Return how many calls of ``call_us`` each to capture, a multiple of the number of copies.

    They are :data:`MIN_CALLS` calls, or as many as fill :data:`LONG_GRAPH_US` if that is fewer,
    rounded up to whole rounds over the copies.
    """
    wanted = min(MIN_CALLS, math.ceil(LONG_GRAPH_US / max(call_us, 1e-3)))
    return num_copies * math.ceil(wanted / num_copies)


def copies_to_rotate(num_bytes: int) -> int:
    """Return how many copies of ``num_bytes`` exceed :data:`ROTATION_BYTES`; at least two."""
    return max(2, ROTATION_BYTES // max(num_bytes, 1) + 1)


def time_cuda(
    contenders: dict[Hashable, Sequence[Callable[[], object]]], *, replays: int = REPLAYS
) -> dict[Hashable, Timing]:
    """Time each contender's calls by graph replay, the contenders in turns.

    Args:
        contenders: for each name its calls, one for each copy of the data; each can be captured.
        replays: timed replays of each; at least 7.

    Returns:
        Time per call, by name.

    Raises:
        ValueError: fewer than 7 replays, or a contender without calls.
    """
    _check(contenders, replays)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())  # which made the copies
    graphs = {}
    for name, calls in contenders.items():
        with torch.cuda.stream(stream):
            for call in calls:  # warm-up: kernel attributes, cuBLAS handles and heuristics
                call()
            start, end = _events()
            start.record(stream)
            for call in calls:
                call()
            end.record(stream)
        stream.synchronize()
        num_calls = calls_in_graph(len(calls), start.elapsed_time(end) * 1e3 / len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(num_calls):
                calls[i % len(calls)]()
        graphs[name] = (graph, num_calls)

    samples: dict[Hashable, list[float]] = {name: [] for name in contenders}
    with torch.cuda.stream(stream):
        for turn in range(WARM_UP_REPLAYS + replays):
            for name, (graph, num_calls) in graphs.items():
                start, end = _events()
                start.record(stream)
                graph.replay()
                end.record(stream)
                end.synchronize()
                if turn >= WARM_UP_REPLAYS:
                    samples[name].append(start.elapsed_time(end) * 1e3 / num_calls)
    return {name: Timing.of(values) for name, values in samples.items()}


def time_cpu(
    contenders: dict[Hashable, Sequence[Callable[[], object]]],
    *,
    replays: int = REPLAYS,
    min_seconds: float = 0.02,
) -> dict[Hashable, Timing]:
    """Time each contender's calls by wall clock, the contenders in turns.

    Args:
        contenders: for each name its calls, one for each copy of the data.
        replays: timed turns of each; at least 7.
        min_seconds: calls are repeated until one turn lasts about this long.

    Returns:
        Time per call, by name.

    Raises:
        ValueError: fewer than 7 replays, or a contender without calls.
    """
    _check(contenders, replays)

    def run(calls: Sequence[Callable[[], object]], num_calls: int) -> float:
        start = time.perf_counter()
        for i in range(num_calls):
            calls[i % len(calls)]()
        return time.perf_counter() - start

    num_calls = {}
    for name, calls in contenders.items():
        run(calls, len(calls))  # warm-up: page faults, thread pools
        one_round = max(run(calls, len(calls)), 1e-9)
        num_calls[name] = len(calls) * max(1, math.ceil(min_seconds / one_round))
    samples: dict[Hashable, list[float]] = {name: [] for name in contenders}
    for _ in range(replays):
        for name, calls in contenders.items():
            samples[name].append(run(calls, num_calls[name]) * 1e6 / num_calls[name])
    return {name: Timing.of(values) for name, values in samples.items()}


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    return start, end


def _check(contenders: dict[Hashable, Sequence[Callable[[], object]]], replays: int) -> None:
    if replays < 7:
        raise ValueError(f"replays must be at least 7 for a median, got {replays}")
    for name, calls in contenders.items():
        if not calls:
            raise ValueError(f"{name} has no calls to time")
