"""Folders that are built under a temporary name and renamed when they are complete.

After a kill at any moment there is either no folder of the final name or a complete one. Finished
parts stay in the temporary folder, and the same call continues from them. Only one run at a time
works on a folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from flash_llm.io.checkpoint import INDEX_NAME, checkpoint_files
from flash_llm.io.files import fingerprint, sync_folder, sync_tree

NOTE_NAME = "unfinished.json"
"""The file in an unfinished folder that records what the folder is made from.

The run that works on the folder holds a lock on this file."""

# The errors of flock on file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def partial_path(dst: Path) -> Path:
    """Return the path of a folder while it is unfinished."""
    return dst.with_name(dst.name + ".partial")


class UnfinishedFolder:
    """An unfinished folder: the note of what it is made from, the result so far and resume data.

    It is locked until :meth:`close`, :meth:`finish`, :meth:`discard` or the end of the process.
    As a context manager it is closed on exit.

    Args:
        dst: the final path of the result; it must not exist.
        src: the checkpoint that the work starts from.
        options: everything else that decides the result, as JSON values.
        caller: function named in errors.
        resume: False removes what an earlier run of the same caller left in ``dst.partial``.

    Attributes:
        path: ``dst.partial``.
        content: the folder inside ``path`` that is renamed to ``dst``.

    Raises:
        FileExistsError: ``dst`` exists; or another run is using ``dst.partial``, or that folder
            belongs to other work, was made from a checkpoint that has changed since, or contains
            links or files of another user.
        OSError: it cannot be created.
    """

    def __init__(
        self,
        dst: Path,
        src: Path,
        options: Mapping[str, Any],
        caller: str,
        *,
        resume: bool = True,
    ) -> None:
        self._dst, self._src, self._caller = dst, src, caller
        self.path = partial_path(dst)
        self.content = self.path / "model"
        check_destination(dst, caller)
        self._files = _fingerprints(src)
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        made_from = {
            "by": caller,
            "src": str(src.resolve()),
            "files": self._files,
            "options": options,
        }
        self._note = self._lock()
        try:
            found = self._read_note()
            if not resume and isinstance(found, dict) and found.get("by") == caller:
                self._clear()
                found = None
            if found is None:
                self._write_note(made_from)
            elif found != made_from:
                raise FileExistsError(
                    f"{caller}: {self.path} belongs to other work, or {src} has changed since; "
                    "remove it to start again"
                )
            self.content.mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> UnfinishedFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock, so that another run can continue."""
        with contextlib.suppress(OSError):  # again, after a failed write of the note
            self._note.close()

    def discard(self) -> None:
        """Remove the whole folder."""
        shutil.rmtree(self.path)
        self.close()

    def check_source(self) -> None:
        """Refuse a source that has changed since the work began.

        Raises:
            ValueError: a file has been replaced or changed; the message names it.
        """
        now = _fingerprints(self._src)
        for name in sorted(self._files.keys() | now.keys()):
            if self._files.get(name) != now.get(name):
                raise ValueError(
                    f"{self._caller}: {self._src / name} was changed during the work, so the "
                    f"result would mix two models. Remove {self.path} and start again"
                )

    def finish(self) -> None:
        """Sync the result to the disk, rename it to ``dst``, and remove the rest.

        Raises:
            ValueError: the source was changed during the work.
            FileExistsError: ``dst`` exists by now.
            OSError: the result cannot be written to the disk.
        """
        self.check_source()
        check_destination(self._dst, self._caller)
        sync_tree(self.content)
        self.content.rename(self._dst)
        sync_folder(self._dst.parent)
        self.discard()

    def _lock(self) -> BinaryIO:
        """Open the note, creating it in a new folder, and lock it."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._refuse_foreign()
                note = open(  # noqa: SIM115 (locked while open)
                    self.path / NOTE_NAME, "a+b", opener=_open_no_link
                )
            except FileNotFoundError:  # another run has just finished or discarded it
                check_destination(self._dst, self._caller)
                continue
            try:
                fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note.close()
                raise FileExistsError(
                    f"{self._caller}: another run is working on {self.path}"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    note.close()
                    raise
            try:
                if os.path.samestat(os.fstat(note.fileno()), os.lstat(note.name)):
                    return note
            except FileNotFoundError:
                pass
            note.close()  # its folder has just been removed

    def _refuse_foreign(self) -> None:
        """Refuse a folder that this class did not make, and anything that leads out of it."""
        problem = None
        if not stat.S_ISDIR(os.lstat(self.path).st_mode):
            problem = "is not a folder"
        elif os.listdir(self.path) and not os.path.lexists(self.path / NOTE_NAME):
            problem = "belongs to other work"
        else:
            # The owner of a new file is the reference, because a file system may map user ids.
            with tempfile.TemporaryFile(dir=self.path) as probe:
                owner = os.fstat(probe.fileno()).st_uid
            for path in (self.path, *self.path.rglob("*")):
                found = os.lstat(path)
                if not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(found.st_mode):
                    problem = f"contains {path.name}, which is not a regular file"
                elif found.st_uid != owner:
                    problem = f"contains {path.name}, which belongs to another user"
        if problem:
            raise FileExistsError(
                f"{self._caller}: {self.path} {problem}; remove it to start again"
            )

    def _read_note(self) -> Any:
        """Return what the note records; None if the folder contains only an empty note."""
        self._note.seek(0)
        text = self._note.read()
        if not text and os.listdir(self.path) == [NOTE_NAME]:
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return ""  # equals no work's record

    def _write_note(self, made_from: dict[str, Any]) -> None:
        try:
            self._note.truncate(0)
            self._note.write(json.dumps(made_from).encode())
            self._note.flush()
            os.fsync(self._note.fileno())
        except OSError as error:
            error.filename = self._note.name
            shutil.rmtree(self.path)
            raise
        sync_folder(self.path)
        sync_folder(self.path.parent)

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != NOTE_NAME:
                path.unlink()


def check_destination(dst: Path, caller: str) -> None:
    """Refuse a folder that exists or cannot be created; ``caller`` is named in errors.

    Raises:
        FileExistsError: ``dst`` exists, even if only as a broken link.
        OSError: the parent of ``dst`` is not a folder, or not writable.
    """
    if os.path.lexists(dst):
        raise FileExistsError(f"{caller}: {dst} exists already")
    parent = dst.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"{caller}: {dst} cannot be created: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{caller}: {dst} cannot be created: {parent} is not writable")


def _fingerprints(src: Path) -> dict[str, list[int]]:
    """Return the fingerprint of each file that a checkpoint's content depends on."""
    files = [*checkpoint_files(src), src / INDEX_NAME, src / "config.json"]
    return {os.path.relpath(f, src): fingerprint(f.stat()) for f in files if f.is_file()}


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
