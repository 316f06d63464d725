"""Files and folders that are built under a temporary name and renamed when they are whole.

A kill at any moment leaves either no folder of the final name or a whole one, and beside it what is
finished, so that the same call goes on with that.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flash_llm.checkpoint import checkpoint_files

NOTE_NAME = "unfinished.json"
"""Says in an unfinished folder what it is made from."""


def partial_path(dst: Path) -> Path:
    """Return what a folder is called until it is whole."""
    return dst.with_name(dst.name + ".partial")


class UnfinishedFolder:
    """A folder in work: a note of what it is, what the work needs to go on, and the result so far.

    Args:
        dst: what the result is going to be called; it must not be there.
        src: checkpoint that the work begins with.
        options: what else decides the result, for JSON.
        caller: function named in errors.

    Attributes:
        path: ``dst.partial``.
        content: the folder in it that becomes ``dst``.

    Raises:
        FileExistsError: ``dst`` is there, or ``dst.partial`` is of other work or of a checkpoint
            that has changed since.
        OSError: it cannot be made.
    """

    def __init__(self, dst: Path, src: Path, options: Mapping[str, Any], caller: str) -> None:
        self._dst = dst
        self.path = partial_path(dst)
        self.content = self.path / "model"
        refuse_existing(dst, caller)
        files = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in checkpoint_files(src)}
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        made_from = {"by": caller, "src": str(src.resolve()), "files": files, "options": options}
        if self.path.exists():
            note = self.path / NOTE_NAME
            if not note.is_file() or json.loads(note.read_text()) != made_from:
                raise FileExistsError(
                    f"{caller}: {self.path} is of other work, or {src} has changed since; remove "
                    "it to begin anew"
                )
        else:
            # Under another name first: a folder without the note would be nobody's.
            fresh = self.path.with_name(self.path.name + ".new")
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            try:
                (fresh / NOTE_NAME).write_text(json.dumps(made_from))
                fresh.rename(self.path)
            except BaseException:
                shutil.rmtree(fresh)
                raise
        self.content.mkdir(exist_ok=True)

    def discard(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.path)

    def finish(self) -> None:
        """Give the result its name and remove the rest."""
        self.content.rename(self._dst)
        shutil.rmtree(self.path)


def refuse_existing(dst: Path, caller: str) -> None:
    """Raise FileExistsError if a folder that is to be made is there; ``caller`` is named in it."""
    if dst.exists():
        raise FileExistsError(f"{caller}: {dst} is there already")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name, which becomes ``path`` if all goes well and vanishes if not."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole, or leave it as it was.

    Raises:
        OSError: it cannot be written; nothing is left of the attempt.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)
