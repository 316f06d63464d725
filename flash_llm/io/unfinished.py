"""Folders that are built under a temporary name and renamed when they are whole.

A kill at any moment leaves either no folder of the final name or a whole one, and beside it what is
finished, so that the same call goes on with that. One run at a time works on a folder.
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
"""Says in an unfinished folder what it is made from; the run that works on the folder locks it."""

# What flock answers on file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def partial_path(dst: Path) -> Path:
    """Return what a folder is called until it is whole."""
    return dst.with_name(dst.name + ".partial")


class UnfinishedFolder:
    """A folder in work: a note of what it is, what the work needs to go on, and the result so far.

    It is locked until :meth:`close`, :meth:`finish`, :meth:`discard` or the end of the process;
    used with ``with``, it is closed in the end.

    Args:
        dst: what the result is going to be called; it must not be there.
        src: checkpoint that the work begins with.
        options: what else decides the result, for JSON.
        caller: function named in errors.
        resume: False removes what an earlier run of the same caller left in ``dst.partial``.

    Attributes:
        path: ``dst.partial``.
        content: the folder in it that becomes ``dst``.

    Raises:
        FileExistsError: ``dst`` is there; or ``dst.partial`` is in work by another run, of other
            work, of a checkpoint that has changed since, or holds links or another user's files.
        OSError: it cannot be made.
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
                    f"{caller}: {self.path} is of other work, or {src} has changed since; remove "
                    "it to begin anew"
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
        """Let other runs go on with the folder."""
        with contextlib.suppress(OSError):  # of a note that could not be written, said already
            self._note.close()

    def discard(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.path)
        self.close()

    def check_source(self) -> None:
        """Refuse a source that is not what it was when the work began.

        Raises:
            ValueError: a file has been replaced or changed; the message names it.
        """
        now = _fingerprints(self._src)
        for name in sorted(self._files.keys() | now.keys()):
            if self._files.get(name) != now.get(name):
                raise ValueError(
                    f"{self._caller}: {self._src / name} was changed during the work; the result "
                    f"would be of two models. Remove {self.path} and begin anew"
                )

    def finish(self) -> None:
        """Give the result its name, once it is on the disk, and remove the rest.

        Raises:
            ValueError: the source was changed during the work.
            FileExistsError: the name has been taken meanwhile.
            OSError: the result cannot be written to the disk.
        """
        self.check_source()
        check_destination(self._dst, self._caller)
        sync_tree(self.content)
        self.content.rename(self._dst)
        sync_folder(self._dst.parent)
        self.discard()

    def _lock(self) -> BinaryIO:
        """Open the note, which is made if the folder is new, and lock it."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._refuse_foreign()
                note = open(  # noqa: SIM115 (open means locked)
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
            note.close()  # of a folder that has just been removed

    def _refuse_foreign(self) -> None:
        """Refuse a folder that is not of this class, and whatever leads out of it."""
        problem = None
        if not stat.S_ISDIR(os.lstat(self.path).st_mode):
            problem = "is no folder"
        elif os.listdir(self.path) and not os.path.lexists(self.path / NOTE_NAME):
            problem = "is of other work"
        else:
            # Compared with a new file's: a file system may map users.
            with tempfile.TemporaryFile(dir=self.path) as probe:
                owner = os.fstat(probe.fileno()).st_uid
            for path in (self.path, *self.path.rglob("*")):
                found = os.lstat(path)
                if not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(found.st_mode):
                    problem = f"holds {path.name}, which is no plain file"
                elif found.st_uid != owner:
                    problem = f"holds {path.name}, which is another user's"
        if problem:
            raise FileExistsError(f"{self._caller}: {self.path} {problem}; remove it to begin anew")

    def _read_note(self) -> Any:
        """What the note holds; None where the folder holds nothing but an empty one."""
        self._note.seek(0)
        text = self._note.read()
        if not text and os.listdir(self.path) == [NOTE_NAME]:
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return ""  # of nobody's work

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
    """Refuse a folder that is there already or cannot be made; ``caller`` is named in errors.

    Raises:
        FileExistsError: ``dst`` is there, if only as a link that leads nowhere.
        OSError: the folder that ``dst`` goes into is none, or cannot be written.
    """
    if os.path.lexists(dst):
        raise FileExistsError(f"{caller}: {dst} is there already")
    parent = dst.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"{caller}: {dst} cannot be made: {parent} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{caller}: {dst} cannot be made: {parent} cannot be written")


def _fingerprints(src: Path) -> dict[str, list[int]]:
    """Fingerprint of each file that decides what a checkpoint is."""
    files = [*checkpoint_files(src), src / INDEX_NAME, src / "config.json"]
    return {os.path.relpath(f, src): fingerprint(f.stat()) for f in files if f.is_file()}


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
