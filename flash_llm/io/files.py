"""Read JSON with checks, and write files atomically.

After a kill or an error there is either the old file or the complete new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# More than any real configuration has, and far below what Python's encoder can handle.
_MAX_JSON_DEPTH = 64

TEMPORARY_NAME = r"\.[0-9a-f]{16}\.tmp"
"""Regular expression of the temporary names of files that are being written."""


def read_json(path: Path, caller: str = "flash_llm") -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
        path: the file.
        caller: function named in errors.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, not an object, or nested too deeply.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{caller}: {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{caller}: {path} must hold an object, got {type(found).__name__}")
    level: list[Any] = [found]
    depth = 0
    while level:
        inner = [v for x in level for v in (x.values() if isinstance(x, dict) else x)]
        level, depth = [v for v in inner if isinstance(v, (dict, list))], depth + 1
        if depth > _MAX_JSON_DEPTH:
            raise ValueError(f"{caller}: {path} is nested more than {_MAX_JSON_DEPTH} deep")
    return found


def from_json(kind: Any, found: Any) -> Any:
    """Convert parsed JSON to a value of an annotated type, such as a dataclass.

    Args:
        kind: a dataclass, a union, ``tuple``, ``list`` or ``dict`` of types, or a type of JSON.
        found: what ``json`` parsed; arrays become tuples where ``kind`` says so.

    Raises:
        ValueError: the value does not have that type; the message names it.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(found, dict):
        hints = typing.get_type_hints(kind)
        if unknown := found.keys() - hints.keys():
            raise ValueError(f"{kind.__name__} has no {min(unknown)!r}")
        try:
            return kind(**{name: from_json(hints[name], value) for name, value in found.items()})
        except TypeError as error:  # a field is missing
            raise ValueError(str(error)) from None
    if origin in (typing.Union, types.UnionType):
        for one in arguments:
            with contextlib.suppress(ValueError):
                return from_json(one, found)
    elif origin is tuple and isinstance(found, list):
        kinds = arguments[:1] * len(found) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(found):
            return tuple(map(from_json, kinds, found))
    elif origin is dict and isinstance(found, dict):
        return {k: from_json(arguments[1], v) for k, v in found.items()}
    elif origin is list and isinstance(found, list):
        return [from_json(arguments[0], v) for v in found]
    elif type(found) is kind or (kind is float and type(found) is int):
        return found
    raise ValueError(f"{found!r:.100} must be {getattr(kind, '__name__', kind)}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that is renamed to ``path`` on success and deleted on failure.

    Its name is random and it is opened exclusively, so two writers never share it and no link is
    followed. Its bytes are on the disk before it is renamed.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
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
    """Write a file atomically: on failure the old file stays as it was.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    with replacing(path) as file:
        file.write(data)


def fingerprint(found: os.stat_result) -> list[int]:
    """Return size, mtime in ns and inode, which change when a file is written or replaced."""
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def sync_folder(folder: Path) -> None:
    """Make a folder's entries survive a power failure, if its file system supports that."""
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
