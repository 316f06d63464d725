"""Where the time of a decode step goes: the GPU's kernels, sorted by what they compute."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

KINDS = (
    ("packed", re.compile(r"flash_llm::")),
    ("attention", re.compile(r"flash|attention|fmha|reshape_and_cache", re.IGNORECASE)),
    ("dense", re.compile(r"gemm|gemv|nvjet|cutlass|splitk", re.IGNORECASE)),
    ("norms", re.compile(r"norm", re.IGNORECASE)),
)
"""What a kernel computes, by its name; the first that matches counts. Dense products include the
language model's head, and vLLM compiles activations and residuals into kernels of norms."""


def kind_of(kernel: str) -> str:
    """Return what a kernel computes, "rest" if its name does not tell."""
    return next((kind for kind, pattern in KINDS if pattern.search(kernel)), "rest")


def busy_times(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Sort the time in which the GPU was busy by what it computed.

    A dependent launch overlaps with the kernel before it; the overlap counts for the earlier one.

    Args:
        kernels: name, start and end of each.

    Returns:
        Time by kind, in the unit of the arguments; together the time in which any kernel ran.
    """
    times = dict.fromkeys([*(kind for kind, _ in KINDS), "rest"], 0.0)
    covered = float("-inf")
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        times[kind_of(name)] += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return times


def account(step: Callable[[], Any], steps: int) -> dict[str, float]:
    """Profile decode steps on the GPU.

    Args:
        step: runs one step.
        steps: how many to run.

    Returns:
        Milliseconds per step by kind.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return {kind: round(us / 1e3 / steps, 4) for kind, us in busy_times(kernels).items()}
