"""Packed models in transformers' own ``save_pretrained`` and ``from_pretrained``, and in PEFT.

Importing flash_llm makes transformers know packed checkpoints (``hf_quantizer.py``) and PEFT merge
adapters of packed layers (``adapters.py``), whichever is imported first, and without importing
either, which takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger("flash_llm")

_TRANSFORMERS = "transformers.modeling_utils"
_ADAPTERS = "peft.tuners.tuners_utils"

# Options of from_pretrained that say where a model is and whether its code may run.
_SOURCE_OPTIONS = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def from_pretrained(folder: str | os.PathLike[str], **options: Any) -> Any:
    """Load a model that ``save_pretrained`` wrote, dense or packed.

    The same as the ``from_pretrained`` of the class that the folder's ``config.json`` names, which
    works too once flash_llm is imported. Without flash_llm transformers says "Unknown quantization
    type" and goes on with random weights in place of the packed ones.

    Args:
        folder: a folder, or a name on the hub.
        options: of ``from_pretrained``, such as ``device_map="auto"``, ``revision="v1.0"``,
            ``subfolder="text_encoder"`` or ``trust_remote_code=True``. The dtype is the
            checkpoint's unless ``dtype`` says otherwise; packed layers can be float16 or bfloat16.

    Returns:
        The model, in ``eval()`` mode.

    Raises:
        ImportError: transformers is not installed.
        OSError: there is no such folder, or no file in it.
        ValueError: the config names no architecture that transformers knows, or one with code of
            its own without ``trust_remote_code=True``; a file or a packed weight is broken; a
            weight is missing or has another shape than in the model.
        TypeError: ``dtype`` is neither float16 nor bfloat16, and a layer is packed.
        NotImplementedError: it was written by a newer flash_llm.
    """
    source = {name: options[name] for name in _SOURCE_OPTIONS if name in options}
    cls, _ = model_class(folder, **source)
    options.pop("code_revision", None)
    return cls.from_pretrained(folder, **options)


def model_class(folder: str | os.PathLike[str], **source: Any) -> tuple[Any, Any]:
    """Return the class of a model that a folder's ``config.json`` names, and the config.

    Args:
        folder: a folder, or a name on the hub.
        source: options of ``from_pretrained`` that say where the model is (``subfolder``,
            ``revision``) and whether its own code may run (``trust_remote_code``).

    Raises:
        ImportError: transformers is not installed.
        ValueError: the config names no architecture that transformers knows, or one with code of
            its own that must not run.
    """
    import transformers

    register()
    config = transformers.AutoConfig.from_pretrained(folder, **source)
    named = config.architectures
    architecture = str(named[0]) if isinstance(named, (list, tuple)) and named else ""
    cls = getattr(transformers, architecture, None)
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    for auto_class, reference in (getattr(config, "auto_map", None) or {}).items():
        if str(reference).endswith(f".{architecture}"):
            own = _own_class(folder, auto_class, reference, known, source)
            return own or cls, config
    if not known:
        raise ValueError(
            f"flash_llm.from_pretrained: the config of {folder} names architecture "
            f"{architecture!r}, which transformers {transformers.__version__} does not have"
        )
    return cls, config


def why_dense(folder: str | os.PathLike[str], layers: Iterable[str]) -> dict[str, str]:
    """Say which weights of a dense folder transformers could not load if they were packed.

    Args:
        folder: of a dense checkpoint with a ``config.json``; its own code is not run.
        layers: names of layers in the checkpoint.

    Returns:
        The reason for each of them. None of them if it cannot be known: transformers is not
        installed, or does not know the model.
    """
    try:
        cls, config = model_class(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = cls(config)
    except Exception as error:  # of any kind: the config may hold anything
        logger.warning(
            "flash_llm: transformers cannot build the model of %s, so that it is not known which "
            "weights it can load packed: %s",
            folder,
            error,
        )
        return {}
    quantizer = importlib.import_module("flash_llm.integrations.hf_quantizer")
    reasons: dict[str, str] = quantizer.why_dense(model, layers)
    return reasons


def _own_class(
    folder: str | os.PathLike[str],
    auto_class: str,
    reference: str,
    known: bool,
    source: dict[str, Any],
) -> Any:
    """A model's class from code that comes with it, if that may run, as AutoModel decides it.

    Raises:
        ValueError: it must not run, and transformers has no such class itself.
    """
    from transformers import dynamic_module_utils

    source = dict(source)
    trusted = dynamic_module_utils.resolve_trust_remote_code(  # type: ignore[no-untyped-call]
        source.pop("trust_remote_code", None), str(folder), known, True
    )
    if not trusted:
        return None
    cls: Any = dynamic_module_utils.get_class_from_dynamic_module(reference, folder, **source)
    cls.register_for_auto_class(auto_class)
    return cls


def register() -> None:
    """Tell transformers how packed checkpoints are loaded; imports it."""
    importlib.import_module("flash_llm.integrations.hf_quantizer").install()


def register_adapters() -> None:
    """Tell PEFT how adapters of packed layers are merged; imports it."""
    importlib.import_module("flash_llm.integrations.adapters")


def register_when_imported() -> None:
    """Register with transformers and PEFT now where they are imported, else as soon as they are."""
    _when_imported(_TRANSFORMERS, register, "packed checkpoints cannot be loaded")
    _when_imported(_ADAPTERS, register_adapters, "adapters of packed layers must not be merged")


def _when_imported(module: str, action: Callable[[], None], consequence: str) -> None:
    """Act now if ``module`` is there, else after it is imported; ``consequence`` is of failing."""

    def act() -> None:
        # A package that is too old or too new must stay importable.
        try:
            action()
        except Exception as error:
            logger.warning("flash_llm: %s: %s", consequence, error)

    if module in sys.modules:
        act()
    elif not any(
        isinstance(finder, _Finder) and finder.module == module for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _Finder(module, act))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds ``module`` where it is, and adds a call to its end."""

    def __init__(self, module: str, act: Callable[[], None]) -> None:
        self.module = module
        self._act = act

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                self._act()
                # Not earlier: an import that is interrupted is tried again.
                with contextlib.suppress(ValueError):  # removed by another thread
                    sys.meta_path.remove(self)

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
