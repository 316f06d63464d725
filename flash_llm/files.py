"""Write files so that a kill or a full disk leaves the old one or the new one, not half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"
"""The end of the name that a file has until it is whole."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a new file to write, which becomes ``path`` if all goes well and vanishes if not.

    Until then its name is random and it is opened as new, so that two writers never share it and
    no link is followed. Its bytes are on the disk before it is renamed.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole, or leave it as it was.

    Raises:
        OSError: it cannot be written; nothing is left of the attempt.
    """
    with replacing(path) as file:
        file.write(data)


def fingerprint(found: os.stat_result) -> list[int]:
    """Size, time of change and number of a file: others as soon as it is written or replaced."""
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power failure, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make all files below a folder survive a power failure, whoever wrote them.

    Raises:
        OSError: a file's bytes cannot be written to the disk.
    """
    for root, _, names in os.walk(folder):
        for name in names:
            with open(Path(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))
