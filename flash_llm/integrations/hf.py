"""Packed models in ``save_pretrained`` and ``from_pretrained`` of transformers, and in PEFT.

Importing flash_llm teaches transformers to load packed checkpoints (``hf_quantizer.py``) and PEFT
to merge adapters over packed layers (``adapters.py``). The order of the imports does not matter,
and flash_llm imports neither package itself, which would take seconds.
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

    This calls ``from_pretrained`` of the class that the folder's ``config.json`` names. Calling it
    directly works too once flash_llm is imported. Without flash_llm transformers logs "Unknown
    quantization type" and continues with random weights in place of the packed ones.

    Args:
        folder: a folder, or a name on the hub.
        options: of ``from_pretrained``, such as ``device_map="auto"``, ``revision="v1.0"``,
            ``subfolder="text_encoder"`` or ``trust_remote_code=True``. The dtype is the
            checkpoint's unless ``dtype`` says otherwise; packed layers can be float16 or bfloat16.

    Returns:
        The model, in ``eval()`` mode.

    Raises:
        ImportError: transformers is not installed.
        OSError: the folder or one of its files does not exist.
        ValueError: the config names no architecture that transformers knows, or one with code of
            its own and ``trust_remote_code=True`` is not set; a file or a packed weight is broken;
            a weight is missing or has another shape than in the model.
        TypeError: ``dtype`` is neither float16 nor bfloat16, and a layer is packed.
        NotImplementedError: a newer flash_llm wrote the checkpoint.
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
    """Return which weights of a dense folder transformers could not load if they were packed.

    Args:
        folder: a dense checkpoint with a ``config.json``; its own code is not run.
        layers: names of layers in the checkpoint.

    Returns:
        The reason for each such layer, by name; empty if it cannot be determined because
        transformers is not installed or does not know the model.
    """
    try:
        cls, config = model_class(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = cls(config)
    except Exception as error:  # of any kind, because the config may contain anything
        logger.warning(
            "flash_llm: transformers cannot build the model of %s, so it is unknown which of its "
            "weights transformers can load packed: %s",
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
    """Return the class from the model's own code; None if AutoModel would not run that code.

    Raises:
        ValueError: the code must not run, and transformers has no such class itself.
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
    """Import transformers and register the loading of packed checkpoints with it."""
    importlib.import_module("flash_llm.integrations.hf_quantizer").install()


def register_adapters() -> None:
    """Import PEFT and change how it merges adapters over packed layers."""
    importlib.import_module("flash_llm.integrations.adapters")


def register_when_imported() -> None:
    """Register with transformers and PEFT: now if they are imported, else when they are."""
    _when_imported(_TRANSFORMERS, register, "packed checkpoints cannot be loaded")
    _when_imported(_ADAPTERS, register_adapters, "adapters of packed layers must not be merged")


def _when_imported(module: str, action: Callable[[], None], consequence: str) -> None:
    """Call ``action`` once ``module`` is imported; if it fails, warn of the ``consequence``."""

    def act() -> None:
        # A version of the package that does not fit must stay importable.
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
    """Finds ``module`` as usual, and calls ``act`` after its code has run."""

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
                # Only now, because an interrupted import can be tried again.
                with contextlib.suppress(ValueError):  # removed by another thread
                    sys.meta_path.remove(self)

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
