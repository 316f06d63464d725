"""Packed layers in vLLM: quantization method ``flash_llm``.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its
processes. Nothing here imports vLLM before that.
"""

from __future__ import annotations

import importlib
import logging
import re

FIRST, LAST = (0, 21), (0, 26)
"""The versions of vLLM that have the interface of the plugin, and which pin our torch.

0.20 has it too, but its ``materialize_layer`` replaces biases that are loaded already by
uninitialised ones, so it would give wrong results.
"""


def register() -> None:
    """Register the quantization method with vLLM; calling it again changes nothing.

    With a version of vLLM outside :data:`FIRST` to :data:`LAST` it logs a warning and registers
    nothing: an exception would also stop models that have nothing to do with flash_llm.
    """
    version = str(importlib.import_module("vllm").__version__)
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not FIRST <= (int(found[1]), int(found[2])) <= LAST:
        logging.getLogger("vllm.flash_llm").warning(
            'flash_llm: quantization "flash_llm" is not registered: it works with vLLM %d.%d to '
            "%d.%d, this is vLLM %s",
            *FIRST,
            *LAST,
            version,
        )
        return
    importlib.import_module("flash_llm.integrations.vllm.config").register()
