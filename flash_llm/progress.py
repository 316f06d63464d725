"""Progress of long work: a bar in a terminal, the caller's own bar, or lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

ProgressBar = Callable[[Sequence[Any], str], Iterable[Any]]
"""Wraps a sequence, given a description, into an iterable that draws; ``rich.progress.track``."""

LOG_SECONDS = 30.0
"""Seconds between two lines of :class:`LogLines`."""


def track(items: Sequence[Any], description: str, progress: bool | ProgressBar) -> Iterable[Any]:
    """Iterate over ``items`` silently (False), under a tqdm bar (True) or under the caller's bar.

    Args:
        items: what to iterate over.
        description: one or two words for the bar.
        progress: False, True, or a callable such as ``rich.progress.track`` or :class:`LogLines`.

    Returns:
        An iterable over ``items``.
    """
    if callable(progress):
        return progress(items, description)
    if not progress:
        return items
    from tqdm.auto import tqdm

    bar: Iterable[Any] = tqdm(items, desc=description)
    return bar


def remark(bar: Iterable[Any], text: str) -> None:
    """Show a short text at the end of a bar of :func:`track`, if the bar supports that."""
    show = getattr(bar, "set_postfix_str", None)
    if show is not None:
        show(text)


class LogLines:
    """A :data:`ProgressBar` for logs: writes lines to stderr, with an estimate of the time left.

    The first line is written at the end of the first item after which the whole is expected to take
    :data:`LOG_SECONDS`. Then lines are at least :data:`LOG_SECONDS` apart, except the last item's.

    Args:
        items: what to iterate over.
        description: the beginning of each line.
    """

    def __init__(self, items: Sequence[Any], description: str) -> None:
        self._items = items
        self._description = description
        self._remark = ""

    def set_postfix_str(self, text: str) -> None:
        """Put a text at the end of the next lines."""
        self._remark = text

    def __iter__(self) -> Iterator[Any]:
        start = time.monotonic()
        written: float | None = None  # time of the last line
        for done, item in enumerate(self._items, start=1):
            yield item
            now = time.monotonic()
            left = (now - start) / done * (len(self._items) - done)
            if written is None:
                due = now - start + left >= LOG_SECONDS
            else:
                due = now - written >= LOG_SECONDS or done == len(self._items)
            if due:
                written = now
                self._write(done, now - start, left)

    def _write(self, done: int, spent: float, left: float) -> None:
        line = f"{self._description}: {done} of {len(self._items)} in {_duration(spent)}"
        if done < len(self._items):
            line += f", about {_duration(left)} left"
        if self._remark:
            line += f" ({self._remark})"
        print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds as ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
