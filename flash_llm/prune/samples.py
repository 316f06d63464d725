"""Calibration data: converts texts, tokens and batches to samples, the inputs of a model.

A sample of text is one sequence without padding. Sequences in memory are used as they are, up to
``seqlen`` tokens; the documents of a file are concatenated and cut into samples of exactly
``seqlen``. A sample for a model that does not take text alone is a dict of its arguments.
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from flash_llm.forward import check_token_ids
from flash_llm.prune.blocks import Sample, is_encoder_decoder

logger = logging.getLogger("flash_llm")

Calibration: TypeAlias = "str | os.PathLike[str] | Tensor | Mapping[str, Any] | Iterable[Any]"
"""A file of text, token ids ``[S, L]``, a batch, or an iterable of sequences or batches of them."""

CHARACTERS_PER_TOKEN = 64
"""About this many characters of a file are tokenised, at most, for each requested token."""

Tokenizer: TypeAlias = Callable[[str], Any]
"""A Hugging Face tokenizer, or ``f(text) -> {"input_ids": [...]}``."""


def samples_for(
    model: nn.Module | None,
    calibration: Calibration | None,
    tokenizer: Tokenizer | None,
    nsamples: int | None,
    seqlen: int,
    seed: int | None,
) -> list[Sample]:
    """Read calibration data.

    Args:
        model: the model to calibrate; None for a text model of unknown vocabulary.
        calibration: the name of a ``.txt`` file, or of a ``.jsonl`` file whose lines are objects
            with a ``"text"`` (both in UTF-8); token ids ``[S, L]``, each row a sample; a dict (or
            another mapping, such as what a tokenizer returns) that holds them, or a list of
            sequences of different lengths, as ``"input_ids"``, and perhaps an
            ``"attention_mask"``, whose zeros mark padding, which is left out; or an iterable, a
            DataLoader say, of strings, of token tensors ``[L]`` or ``[B, L]``, of tuples that
            begin with one, or of such dicts. For a model of transformers that takes something else
            (pictures, sound), one or several dicts of its arguments, each used as a sample. For any
            model, a dict counts as arguments if it has floating point tensors for arguments of
            ``forward`` other than the attention mask and labels; for an encoder-decoder, if it
            holds what is decoded (``"decoder_input_ids"`` or ``"labels"``), otherwise the text is
            input and labels.
        tokenizer: needed for strings and files.
        nsamples: number of samples to use; None for all.
        seqlen: largest number of tokens of a sample.
        seed: a number draws the samples at random from all, without replacement. None takes the
            first ``nsamples`` of an iterable and reads no further, and of a file ``nsamples`` that
            are spread evenly over it.

    Returns:
        At least one sample: int64 token ids ``[1, L]`` with ``1 <= L <= seqlen``, or arguments of
        the model by name. If samples in memory are shorter than ``seqlen``, a warning is logged.

    Raises:
        OSError: the file cannot be read (FileNotFoundError: it is not there).
        TypeError: the data or one of its items is none of the above, or ids are neither int32 nor
            int64; the model needs more than text.
        ValueError: there are no tokens; a file has fewer than ``seqlen`` tokens or another suffix,
            is not UTF-8, or has a line that is not such a JSON object; a tokenizer is missing; a
            shape or a number is wrong; a token id is outside the vocabulary.
    """
    if calibration is None:
        raise ValueError("calibration text is needed; pass calibration=")
    if nsamples is not None and nsamples < 1:
        raise ValueError(f"nsamples must be at least 1, got {nsamples}")
    if seqlen < 1:
        raise ValueError(f"seqlen must be at least 1, got {seqlen}")
    samples: list[Sample]
    if isinstance(calibration, (str, os.PathLike)):
        _refuse_text(model, f"the file {calibration}")
        samples = [*_from_file(Path(calibration), tokenizer, nsamples, seqlen, seed)]
    else:
        samples = _from_memory(model, calibration, tokenizer, nsamples, seqlen, seed)
    if model is not None:
        for sample in samples:
            ids = _ids(sample)
            if ids is not None:
                check_token_ids(ids, model)
    return samples


def _from_memory(
    model: nn.Module | None,
    calibration: Any,
    tokenizer: Tokenizer | None,
    nsamples: int | None,
    seqlen: int,
    seed: int | None,
) -> list[Sample]:
    rows = (row for item in _items(calibration) for row in _rows(item, model))
    samples: list[Sample] = []
    for row in _draw(rows, nsamples, seed):
        if isinstance(row, dict):
            samples.append(row)
        else:
            ids = _tokenize(row, tokenizer) if isinstance(row, str) else row
            samples.extend([ids[None, :seqlen]] if len(ids) else [])
    if not samples:
        raise ValueError("calibration holds no tokens")
    lengths = [sample.shape[1] for sample in samples if isinstance(sample, Tensor)]
    if min(lengths, default=seqlen) < seqlen:
        logger.warning(
            "flash_llm: %d of %d calibration samples have fewer than seqlen=%d tokens (the "
            "shortest %d); they are used as they are",
            sum(length < seqlen for length in lengths),
            len(lengths),
            seqlen,
            min(lengths),
        )
    return samples


def _draw(rows: Iterator[Any], nsamples: int | None, seed: int | None) -> list[Any]:
    if nsamples is None or seed is None:
        return list(itertools.islice(rows, nsamples))
    every = list(rows)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return [every[index] for index in sorted(order[:nsamples].tolist())]


def count_tokens(samples: Iterable[Sample]) -> int:
    """Return the number of token ids in the samples; 0 for models that do not take text."""
    return sum(ids.numel() for ids in map(_ids, samples) if ids is not None)


def _ids(sample: Sample) -> Tensor | None:
    ids = sample if isinstance(sample, Tensor) else sample.get("input_ids")
    return ids if isinstance(ids, Tensor) else None


def _needed_arguments(model: nn.Module | None) -> list[str]:
    """Return the names of a model's inputs, if it needs others than token ids."""
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids":
        return []
    return [main, "decoder_input_ids"] if is_encoder_decoder(model) else [main]


def _refuse_text(model: nn.Module | None, found: str) -> None:
    needed = _needed_arguments(model)
    if needed:
        raise TypeError(
            f"{type(model).__name__} is called with {' and '.join(needed)}: calibration must be "
            f"dicts of its arguments, got {found}"
        )


def _arguments(item: Any, model: nn.Module | None) -> dict[str, Any] | None:
    """Return a mapping as arguments of the model; None if it is text with its mask and labels."""
    arguments = {str(key): item[key] for key in list(item.keys())}
    if not _needed_arguments(model):
        known = {} if model is None else inspect.signature(model.forward).parameters
        more = known.keys() & arguments.keys() - {"attention_mask", "labels"}
        values = [arguments[name] for name in more]
        floating = any(isinstance(v, Tensor) and v.is_floating_point() for v in values)
        decoded = is_encoder_decoder(model) and arguments.keys() & {"decoder_input_ids", "labels"}
        if not floating and not decoded:
            return None
    for name, value in arguments.items():
        if isinstance(value, (list, np.ndarray)):
            raise TypeError(
                f"a calibration sample of {type(model).__name__} must hold tensors, {name} is "
                f"{type(value).__name__}"
            )
    return arguments


def _items(calibration: Any) -> Iterable[Any]:
    """Return data in memory as an iterable of sequences and batches."""
    if _is_mapping(calibration) or (isinstance(calibration, Tensor) and calibration.dim() == 1):
        return [calibration]
    if not isinstance(calibration, Iterable):
        raise TypeError(
            "calibration must be a file's name, token tensors or strings, got "
            f"{type(calibration).__name__}"
        )
    return calibration


def _is_mapping(value: Any) -> bool:
    """Whether iteration yields keys: a dict, the result of a tokenizer, a data frame."""
    if isinstance(value, Mapping):
        return True
    if not hasattr(value, "keys") or not isinstance(value, Iterable):
        return False
    first = next(iter(value), None)
    return isinstance(first, str) and first in value.keys()  # type: ignore[attr-defined]


def _rows(item: Any, model: nn.Module | None) -> Iterator[str | Tensor | dict[str, Any]]:
    """Yield the samples in one item: strings, int64 ids ``[L]``, or arguments by name."""
    mask = None
    if not _is_mapping(item):
        _refuse_text(model, type(item).__name__)
    if isinstance(item, str):
        yield item
        return
    if _is_mapping(item):
        arguments = _arguments(item, model)
        if arguments is not None:
            yield arguments
            return
        names = list(item.keys())
        if "input_ids" not in names:
            raise TypeError(
                'a calibration item that is a dict must have "input_ids", got the keys '
                f"{sorted(map(str, names))}"
            )
        mask = item["attention_mask"] if "attention_mask" in names else None
        item = item["input_ids"]
        if not isinstance(item, Tensor) and any(isinstance(row, Iterable) for row in item):
            # A batch of sequences, perhaps of different lengths.
            masks = [None] * len(item) if mask is None else list(mask)
            if len(masks) != len(item):
                raise ValueError(
                    f"attention_mask must have a row for each of the {len(item)} of input_ids, "
                    f"got {len(masks)}"
                )
            for ids, used in zip(item, masks, strict=True):
                yield from _rows({"input_ids": ids, "attention_mask": used}, model)
            return
        item = torch.as_tensor(item)
    elif isinstance(item, (tuple, list)) and item and isinstance(item[0], Tensor):
        item = item[0]
    if not isinstance(item, Tensor):
        raise TypeError(
            "a calibration sample must be a token tensor, a string, or a dict with "
            f'"input_ids", got {type(item).__name__}'
        )
    if item.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"calibration ids must be int32 or int64, got {item.dtype}")
    if item.dim() not in (1, 2):
        raise ValueError(
            f"a calibration sample must have shape [L] or [B, L], got {list(item.shape)}"
        )
    used = torch.ones_like(item) if mask is None else torch.as_tensor(mask)
    if used.shape != item.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {list(item.shape)}, got "
            f"{list(used.shape)}"
        )
    if item.dim() == 1:
        item, used = item[None], used[None]
    for ids, keep in zip(item, used, strict=True):
        yield ids[keep.bool()].to(torch.int64)


def _from_file(
    path: Path, tokenizer: Tokenizer | None, nsamples: int | None, seqlen: int, seed: int | None
) -> list[Tensor]:
    """Return samples ``[1, seqlen]`` of a file: drawn with a seed, else spread evenly over it."""
    documents = _documents(path)
    if nsamples is None or seed is not None:
        return _draw(_cut(path, documents, tokenizer, seqlen), nsamples, seed)
    documents = _thinned(list(documents), nsamples, seqlen * CHARACTERS_PER_TOKEN)
    every = list(_cut(path, documents, tokenizer, seqlen))
    number = min(nsamples, len(every))
    return [every[index * len(every) // number] for index in range(number)]


def _thinned(documents: list[str], number: int, size: int) -> Iterator[str]:
    """Return about ``number * size`` characters in parts that are spread evenly over the documents.

    So a large file is not tokenised completely. A part has at most ``size`` characters.
    """
    parts = [
        document[start : start + size]
        for document in documents
        for start in range(0, len(document), size)
    ]
    stride = sum(map(len, parts)) // (number * size)
    return iter(documents if stride < 2 else parts[::stride])


def _cut(
    path: Path, documents: Iterator[str], tokenizer: Tokenizer | None, seqlen: int
) -> Iterator[Tensor]:
    """Yield samples ``[1, seqlen]`` of the concatenated documents; the rest is dropped."""
    left = torch.empty(0, dtype=torch.int64)
    found = False
    for document in documents:
        left = torch.cat([left, _tokenize(document, tokenizer)])
        *whole, left = torch.split(left, seqlen)
        if len(left) == seqlen:
            whole, left = [*whole, left], left[:0]
        for sample in whole:
            found = True
            yield sample[None]
    if not found:
        raise ValueError(
            f"the calibration file {path} has {len(left)} tokens, fewer than seqlen={seqlen}"
            if len(left)
            else f"the calibration file {path} holds no tokens"
        )


def _documents(path: Path) -> Iterator[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"the calibration file must end in .txt or .jsonl, got {str(path)!r} (several texts "
            "are passed as a list)"
        )
    try:
        with path.open(encoding="utf-8-sig") as file:  # skips a byte order mark
            if path.suffix == ".txt":
                yield file.read()
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(line, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"the calibration file {path} is not UTF-8: {error}") from None


def _text_of(line: str, place: str) -> str:
    """Return the text in a line of a .jsonl file."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: no JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError(f'{place}: must be an object with a string "text"')
    text: str = entry["text"]
    return text


def _tokenize(text: str, tokenizer: Tokenizer | None) -> Tensor:
    if tokenizer is None:
        raise ValueError("calibration strings need a tokenizer; pass tokenizer=")
    return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
