"""Packed models in transformers' own ``save_pretrained`` and ``from_pretrained``, and in PEFT.

Importing flash_llm makes transformers know packed checkpoints (:mod:`flash_llm.hf_quantizer`) and
PEFT merge adapters of packed layers (:mod:`flash_llm.adapters`), whichever is imported first, and
without importing either, which takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from flash_llm.linear import SparseLinear

logger = logging.getLogger("flash_llm")

_QUANTIZERS = "transformers.quantizers.auto"
_ADAPTERS = "peft.tuners.tuners_utils"


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


def register_adapters() -> None:
    """Tell PEFT how adapters of packed layers are merged; imports it."""
    importlib.import_module("flash_llm.adapters")


def register_when_imported() -> None:
    """Register with transformers and PEFT now where they are imported, else as soon as they are."""
    _when_imported(_QUANTIZERS, register, "packed checkpoints cannot be loaded")
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
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                self._act()

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
