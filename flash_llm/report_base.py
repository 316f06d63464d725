"""The base of all reports: they print, convert to JSON, and some are saved beside a model."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from flash_llm.io.files import from_json, read_json, write_whole

_Saved = TypeVar("_Saved", bound="SavedReport")


class Report:
    """Base of the dataclasses that describe the result of a call; ``print`` one for a table."""

    IN_JSON: ClassVar[tuple[str, ...]] = ()
    """Names of the properties that JSON holds in addition to the fields."""

    def to_json(self) -> str:
        """Return the fields and the properties of ``IN_JSON`` as an indented JSON object."""
        return json.dumps(as_json(self), indent=2)

    def summary(self) -> str:
        """Return the text of ``print``; layers whose names differ only in indices share a line."""
        return str(self)


class SavedReport(Report):
    """A report that can be saved in a folder, such as that of the model."""

    FILE_NAME: ClassVar[str]
    """Name of the file."""

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the report as JSON to the file ``FILE_NAME``.

        Args:
            folder: created if it does not exist; an earlier report in it is replaced.

        Returns:
            The file.

        Raises:
            OSError: the file cannot be written; an earlier one stays as it was.
        """
        path = Path(folder) / self.FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.to_json().encode())
        return path

    @classmethod
    def load(cls: type[_Saved], folder: str | os.PathLike[str]) -> _Saved:
        """Read what :meth:`save` wrote.

        Args:
            folder: that holds the file ``FILE_NAME``.

        Raises:
            OSError: the file does not exist or cannot be read.
            ValueError: the file does not hold such a report, or one of another version.
        """
        path = Path(folder) / cls.FILE_NAME
        try:
            stored = read_json(path)
            for name in cls.IN_JSON:  # follow from the fields
                stored.pop(name, None)
            report: _Saved = from_json(cls, stored)
        except ValueError as error:
            raise ValueError(f"{path} holds no {cls.__name__}: {error}") from None
        return report


def as_json(value: Any) -> Any:
    """Return nested dataclasses, dicts and sequences as JSON's types.

    A dataclass becomes a dict of its fields and of the properties that its ``IN_JSON`` names.
    """
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        names += getattr(value, "IN_JSON", ())
        return {name: as_json(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [as_json(item) for item in value]
    return value
