"""Progress without a terminal: lines in a log, few of them, with the time that is left."""

import re

import pytest

from flash_llm import progress
from flash_llm.cli import options
from flash_llm.progress import LogLines, remark, track


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test itself lets pass."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines_of(clock, capsys, durations, text=None):
    bar = track(durations, "pruning", LogLines)
    for seconds in bar:
        clock[0] += seconds
        if text is not None:
            remark(bar, text)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_log_gets_an_estimate_first_and_then_a_line_now_and_then(clock, capsys):
    lines = lines_of(clock, capsys, [5.0] * 30, "layer 3")
    assert lines[0] == "pruning: 1 of 30 in 0:00:05, about 0:02:25 left (layer 3)"
    assert [int(re.search(r"(\d+) of 30", line)[1]) for line in lines] == [1, 7, 13, 19, 25, 30]
    assert lines[-1] == "pruning: 30 of 30 in 0:02:30 (layer 3)"


@pytest.mark.parametrize(
    ("durations", "count"),
    [([], 0), ([29.0], 0), ([1.0] * 29, 0), ([31.0], 1), ([3700.0, 1.0], 2), ([0.1] * 9 + [60], 1)],
)
def test_only_long_work_writes_to_a_log(durations, count, clock, capsys):
    assert len(lines_of(clock, capsys, durations)) == count


def test_the_shell_writes_lines_where_there_is_no_terminal(monkeypatch):
    assert options.progress() is LogLines
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert options.progress() is True
