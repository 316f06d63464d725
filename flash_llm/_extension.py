"""Loads the compiled extension ``flash_llm._C``; a failure does not make the import fail.

Loading the extension also registers the operators of ``torch.ops.flash_llm``. If it cannot be
loaded, :func:`require` raises an error with the reason and the fix at the first use.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from types import ModuleType

import torch

INSTALL_COMMAND = "pip install --no-build-isolation -e ."
"""Builds the extension against the installed torch, when run in the root of the repository."""


def _load() -> tuple[ModuleType | None, str]:
    """Return the extension and "", or None and what was found instead."""
    try:
        module = importlib.import_module("flash_llm._C")
    # Another version of torch causes ImportError (undefined symbol), OSError or, in static
    # initialisers, RuntimeError. None of them may make the import of flash_llm fail.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_llm._C":
            return None, "no built extension beside flash_llm/__init__.py"
        return None, f"an extension that does not load: {type(error).__name__}: {error}"
    built_against = str(module.build_info()["torch"])
    if _release(built_against) != _release(torch.__version__):
        # torch has no stable C++ ABI: structs may differ even if every symbol is found.
        return None, f"an extension built against torch {built_against}"
    return module, ""


def _release(version: str) -> str:
    return version.split("+")[0]


def _needed() -> str:
    try:
        requirements = importlib.metadata.requires("flash-llm") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    # The installed package requires the version of torch that it was built against.
    pin = next((line for line in requirements if line.startswith("torch==")), None)
    return "an extension built against this torch" + (
        f" (the installed package was built against {pin})" if pin else ""
    )


_module, _found = _load()


def available() -> bool:
    """Whether the extension is loaded and so the operators exist."""
    return _module is not None


def require() -> ModuleType:
    """Return ``flash_llm._C``.

    Returns:
        The pybind11 module: ``build_info``, ``configs``, ``plan_names``, ``explain_plan``,
        ``check_header``, ``check_holds`` and the constants of the formats.

    Raises:
        RuntimeError: the extension is missing or cannot be loaded. The message says what was found,
            what is needed, and which command fixes it.
    """
    if _module is None:
        raise RuntimeError(
            f"flash_llm: the compiled extension flash_llm._C is not usable. Found: {_found}, "
            f"with torch {torch.__version__} and Python {platform.python_version()}. "
            f"Needed: {_needed()}. "
            f"Run in the repository: {INSTALL_COMMAND}"
        )
    return _module
