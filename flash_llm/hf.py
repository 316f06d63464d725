"""Packed models in transformers' own ``save_pretrained`` and ``from_pretrained``.

Importing flash_llm makes transformers know packed checkpoints (:mod:`flash_llm.hf_quantizer`),
whichever of the two is imported first, and without importing transformers, which takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from flash_llm.linear import SparseLinear

logger = logging.getLogger("flash_llm")

_REGISTRY = "transformers.quantizers.auto"


def from_pretrained(folder: str | os.PathLike[str], **options: Any) -> Any:
    """Load a model that ``save_pretrained`` wrote, dense or packed.

    The same as the ``from_pretrained`` of the class that the folder's ``config.json`` names, which
    works too once flash_llm is imported. Without flash_llm transformers says "Unknown quantization
    type" and goes on with random weights in place of the packed ones.

    Args:
        folder: a folder, or a name on the hub.
        options: of ``from_pretrained``, such as ``device_map="auto"``. The dtype is the
            checkpoint's unless ``dtype`` says otherwise.

    Returns:
        The model, in ``eval()`` mode.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the config names no architecture that transformers knows; a file or a packed
            weight is broken.
        NotImplementedError: it was written by a newer flash_llm.
    """
    cls, _ = model_class(folder)
    return cls.from_pretrained(folder, **{"dtype": "auto", **options})


def model_class(folder: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Return the class of transformers that a folder's ``config.json`` names, and the config.

    Args:
        folder: a folder, or a name on the hub.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the config names no architecture that transformers knows.
    """
    import transformers

    register()
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = (config.architectures or [""])[0]
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise ValueError(
            f"flash_llm.from_pretrained: the config of {folder} names architecture "
            f"{architecture!r}, which transformers {transformers.__version__} does not have"
        )
    return cls, config


def adopt(model: nn.Module) -> None:
    """Make ``save_pretrained`` of the models of transformers in ``model`` save packed layers.

    Args:
        model: after its layers were packed.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    from flash_llm.hf_quantizer import METHOD, FlashLLMConfig, FlashLLMQuantizer

    for inner in model.modules():
        if not isinstance(inner, transformers.PreTrainedModel):
            continue
        sparse = any(isinstance(layer, SparseLinear) for layer in inner.modules())
        if sparse and getattr(inner, "hf_quantizer", None) is None:
            inner.hf_quantizer = FlashLLMQuantizer(FlashLLMConfig(), pre_quantized=True)
            inner.quantization_method = METHOD
            inner.config.quantization_config = inner.hf_quantizer.quantization_config


def register() -> None:
    """Tell transformers how packed checkpoints are loaded; imports it."""
    importlib.import_module("flash_llm.hf_quantizer")  # which registers its classes


def register_when_imported() -> None:
    """Call :func:`register` now if transformers has its registry, else as soon as it does."""
    if _REGISTRY in sys.modules:
        _try_to_register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _try_to_register() -> None:
    # A transformers that is too old or too new must stay importable.
    try:
        register()
    except Exception as error:
        logger.warning("flash_llm: packed checkpoints cannot be loaded: %s", error)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module with the registry where it is, and adds a call to its end."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _try_to_register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
