"""Quality of a language model: perplexity over sliding windows.

The definition is that of Hugging Face's "Perplexity of fixed-length models": the text is divided
into windows of a fixed length, and each token is scored once, in the first window that contains it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flash_llm.forward import check_token_ids, evaluation_mode
from flash_llm.integrations import hf
from flash_llm.progress import ProgressBar, track
from flash_llm.report_base import Report
from flash_llm.table import aligned


def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: bool | ProgressBar = False,
) -> float:
    """Perplexity ``exp(-mean log p(t_i | t_<i))`` of a causal language model on one long text.

    Window ``w`` covers the tokens ``[w * stride, w * stride + window)``. A token is scored in the
    first window that contains it, given the tokens before it in that window; the first token of the
    text has no context and is never scored. With ``stride == window`` the windows are disjoint and
    the first token of each is left out; a smaller stride gives each token at least
    ``window - stride`` tokens of context and costs ``window / stride`` times as much. Log
    probabilities are taken in float32 and summed in float64.

    Args:
        model: called as ``model(ids)`` with int64 ids ``[1, window]`` on the device of its first
            parameter; returns logits ``[1, window, vocabulary]`` or an object with ``.logits``.
        token_ids: integer ``[T]`` or ``[1, T]``, ``T >= 2``.
        window: tokens per window, at least 2.
        stride: tokens between the starts of two windows, in [1, window]; None means ``window``.
        max_windows: largest number of windows to score, from the start; None for all.
        progress: True for a tqdm bar, or a callable such as ``rich.progress.track``.

    Returns:
        The perplexity; ``inf`` when the mean negative log likelihood exceeds the float range, NaN
        when a logit is NaN.

    Raises:
        TypeError: ``token_ids`` is not an integer tensor.
        ValueError: a shape or a number is out of range, or an id is outside the vocabulary.

    Example:
        >>> class Uniform(nn.Module):
        ...     def forward(self, ids):
        ...         return torch.zeros(*ids.shape, 50)
        >>> round(perplexity(Uniform(), torch.arange(40), window=8), 3)
        50.0
    """
    if not isinstance(token_ids, Tensor) or token_ids.dtype not in (torch.int32, torch.int64):
        found = token_ids.dtype if isinstance(token_ids, Tensor) else type(token_ids).__name__
        raise TypeError(f"token_ids must be an int32 or int64 tensor, got {found}")
    if token_ids.dim() == 2 and token_ids.shape[0] == 1:
        token_ids = token_ids[0]
    if token_ids.dim() != 1 or token_ids.shape[0] < 2:
        raise ValueError(
            f"token_ids must have shape [T] or [1, T] with T >= 2, got {list(token_ids.shape)}"
        )
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride must lie in [1, window={window}], got {stride}")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows must be at least 1, got {max_windows}")

    check_token_ids(token_ids, model)
    parameter = next(model.parameters(), None)
    ids = token_ids.to("cpu" if parameter is None else parameter.device, torch.int64)
    nll = 0.0
    num_scored = 0
    with evaluation_mode(model):
        windows = _windows(ids.shape[0], window, stride, max_windows)
        for begin, end, first_scored in track(windows, "perplexity", progress):
            output = model(ids[None, begin:end])
            logits = output if isinstance(output, Tensor) else output.logits
            # logits[i] predicts token begin + i + 1
            loss = nn.functional.cross_entropy(
                logits[0, first_scored - begin - 1 : end - begin - 1].float(),
                ids[first_scored:end],
                reduction="none",
            )
            nll += loss.double().sum().item()
            num_scored += end - first_scored
    try:
        return math.exp(nll / num_scored)
    except OverflowError:
        return math.inf


@dataclasses.dataclass(frozen=True)
class ModelPerplexity:
    """Perplexity of one model on the text.

    Attributes:
        model: its folder.
        perplexity: see :func:`perplexity`.
        num_tokens: number of scored tokens, as the model's own tokenizer counts: the tokens of the
            text, except those without context and those after the last window.
        seconds: wall-clock time of the passes.
    """

    model: str
    perplexity: float
    num_tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class PerplexityReport(Report):
    """Perplexities of models on one text; prints as a table.

    Attributes:
        text: the file.
        window: tokens per window.
        stride: tokens between the starts of two windows.
        max_windows: largest number of windows that were scored, from the start; None for all.
        models: in the order given.
    """

    text: str
    window: int
    stride: int
    max_windows: int | None
    models: tuple[ModelPerplexity, ...]

    def __str__(self) -> str:
        """One line per model; "to the first" is the ratio to the perplexity of the first model."""
        limit = "" if self.max_windows is None else f"at most the first {self.max_windows} "
        table = [("model", "perplexity", "to the first", "tokens scored", "seconds")]
        for row in self.models:
            table.append(
                (
                    row.model,
                    f"{row.perplexity:.4g}",
                    f"{row.perplexity / self.models[0].perplexity:.4f}",
                    str(row.num_tokens),
                    f"{row.seconds:.1f}",
                )
            )
        return "\n".join(
            [
                *aligned(table, left={0}),
                f"On {self.text}, {limit}windows of {self.window} tokens, stride {self.stride}.",
            ]
        )


def evaluate_checkpoints(
    folders: Sequence[str | os.PathLike[str]],
    text: str | os.PathLike[str],
    *,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    progress: bool | ProgressBar = False,
) -> PerplexityReport:
    """Perplexity of saved language models on a text file, one model in memory at a time.

    Args:
        folders: of models with their tokenizers, dense or packed.
        text: a UTF-8 file.
        window: as in :func:`perplexity`.
        stride: as in :func:`perplexity`.
        max_windows: as in :func:`perplexity`.
        device: where the models run.
        trust_remote_code: run the Python code in a folder for its model and tokenizer.
        progress: as in :func:`perplexity`.

    Returns:
        The perplexity of each model. Models with different tokenizers cannot be compared.

    Raises:
        ImportError: transformers is not installed.
        OSError: a folder or the text cannot be read, or a folder has no tokenizer.
        ValueError: no folder is given; the text is not UTF-8 or has fewer than two tokens; a number
            is out of range; a checkpoint is broken, not a causal language model, or contains code
            that is not trusted.
    """
    if not folders:
        raise ValueError("flash_llm.evaluate_checkpoints: there must be a folder")
    try:
        content = Path(text).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"flash_llm.evaluate_checkpoints: {text} is not UTF-8: {error}") from None
    # Before any model is loaded; transformers would look up a missing folder on the hub.
    for folder in folders:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"flash_llm.evaluate_checkpoints: {folder} is no folder")
        cls, config = hf.model_class(folder, trust_remote_code=trust_remote_code)
        if not cls.can_generate() or getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"flash_llm.evaluate_checkpoints: perplexity needs a causal language model, "
                f"{folder} holds a {cls.__name__}"
            )
    import transformers

    stride = window if stride is None else stride
    models = []
    for folder in folders:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
        ids = torch.tensor(tokenizer(content, verbose=False)["input_ids"], dtype=torch.int64)
        model = hf.from_pretrained(folder, trust_remote_code=trust_remote_code).to(device)
        start = time.perf_counter()
        found = perplexity(
            model,
            ids,
            window=window,
            stride=stride,
            max_windows=max_windows,
            progress=progress,
        )
        seconds = time.perf_counter() - start
        windows = _windows(ids.numel(), window, stride, max_windows)
        scored = sum(end - first_scored for _, end, first_scored in windows)
        models.append(ModelPerplexity(os.fspath(folder), found, scored, seconds))
        del model  # before the next one is loaded
    return PerplexityReport(os.fspath(text), window, stride, max_windows, tuple(models))


def _windows(
    num_tokens: int, window: int, stride: int, max_windows: int | None
) -> list[tuple[int, int, int]]:
    """Return windows as ``(begin, end, first scored token)``; each scores at least one token."""
    windows = []
    scored_to = 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        first_scored = max(scored_to, begin + 1)
        if first_scored < end:
            windows.append((begin, end, first_scored))
        scored_to = max(scored_to, end)
        if end == num_tokens:
            break
    return windows[:max_windows]
