"""Makes Ctrl-C work at any moment, in code of other packages too.

Imports, and callbacks whose exceptions Python only prints, can swallow a KeyboardInterrupt: two of
40 interrupted imports of torch continued as if nothing had happened (numpy caught the exception). A
process that was started with Ctrl-C ignored (``nohup``, a background job of a script) still ignores
it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

EXIT_CODE = 130
"""The exit code that shells report for a process that SIGINT ended."""

# Cleaning up takes less time than this; otherwise the KeyboardInterrupt was swallowed.
_AGAIN_SECONDS = 3.0


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Delay Ctrl-C until the end of this block, which then raises KeyboardInterrupt."""
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if not _in_main_thread() or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def exit_at_once() -> None:
    """Make Ctrl-C end the process immediately, for the time before it has work to lose."""
    if _in_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


@contextlib.contextmanager
def raised_until_caught() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt, again and again until it has left this block."""
    before = signal.getsignal(signal.SIGINT)
    if not _in_main_thread() or before not in (signal.default_int_handler, _exit):
        yield
        return
    alarm = signal.getsignal(signal.SIGALRM)
    timer = None

    def interrupt(*_: object) -> None:
        nonlocal timer
        signal.signal(signal.SIGALRM, interrupt)
        replaced = signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        timer = timer or replaced
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if timer is not None:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, alarm)


def _in_main_thread() -> bool:
    # Only the main thread can set handlers, and they are called in it.
    return threading.current_thread() is threading.main_thread()


def _exit(*_: object) -> None:
    os.write(2, b"flash-llm: interrupted\n")
    os._exit(EXIT_CODE)
