"""Loads the compiled extension ``flash_llm._C`` without ever failing at import.

Loading the extension also registers the operators of ``torch.ops.flash_llm``. When it cannot be
loaded, the reason is kept and :func:`require` raises it, with the fix, at the first use.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from types import ModuleType

import torch

INSTALL_COMMAND = "pip install --no-build-isolation -e ."
"""Run in the repository root; builds the extension against the torch that is installed."""


def _load() -> tuple[ModuleType | None, str]:
    """Return the extension and "", or None and one sentence on what was found instead."""
    try:
        module = importlib.import_module("flash_llm._C")
    # A torch of another version shows up as ImportError (undefined symbol), OSError or, from static
    # initialisers, RuntimeError; whichever it is, importing flash_llm must go on.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_llm._C":
            return None, "no built extension beside flash_llm/__init__.py"
        return None, f"an extension that does not load: {type(error).__name__}: {error}"
    built_against = str(module.build_info()["torch"])
    if _release(built_against) != _release(torch.__version__):
        # C++ torch has no stable ABI: even when every symbol resolves, structs may differ.
        return None, f"an extension built against torch {built_against}"
    return module, ""


def _release(version: str) -> str:
    return version.split("+")[0]


def _needed() -> str:
    try:
        requirements = importlib.metadata.requires("flash-llm") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    # The installed package pins the torch that it was built against.
    pin = next((line for line in requirements if line.startswith("torch==")), None)
    return "an extension built against this torch" + (
        f" (the installed package was built against {pin})" if pin else ""
    )


_module, _found = _load()


def available() -> bool:
    """Whether the extension is loaded, so that the operators exist."""
    return _module is not None


def require() -> ModuleType:
    """Return ``flash_llm._C``.

    Returns:
        The pybind11 module: ``build_info``, ``configs``, ``plan_names``, ``explain_plan``,
        ``position_of`` and the constants of the format.

    Raises:
        RuntimeError: the extension is missing or does not load. The message says what was found,
            what is needed, and the command that fixes it.
    """
    if _module is None:
        raise RuntimeError(
            f"flash_llm: the compiled extension flash_llm._C is not usable. Found: {_found}, "
            f"with torch {torch.__version__} and Python {platform.python_version()}. "
            f"Needed: {_needed()}. "
            f"Run in the repository: {INSTALL_COMMAND}"
        )
    return _module
