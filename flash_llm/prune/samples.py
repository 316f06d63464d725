"""Calibration data: from what users have to samples of token ids.

A sample is one sequence without padding. Sequences in memory are used as they are, cut to
``seqlen``; the documents of a file are laid end to end and cut into samples of exactly ``seqlen``.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flash_llm.forward import check_token_ids

logger = logging.getLogger("flash_llm")

Calibration: TypeAlias = "str | os.PathLike[str] | Tensor | Iterable[Any]"
"""A file of text, token ids ``[S, L]``, or an iterable of sequences or batches of them."""

Tokenizer: TypeAlias = Callable[[str], Any]
"""A Hugging Face tokenizer, or ``f(text) -> {"input_ids": [...]}``."""


def token_samples(
    calibration: Calibration | None,
    tokenizer: Tokenizer | None,
    nsamples: int | None,
    seqlen: int,
    seed: int | None,
) -> list[Tensor]:
    """Read calibration data.

    Args:
        calibration: the name of a ``.txt`` file, or of a ``.jsonl`` file whose lines are objects
            with a ``"text"`` (both in UTF-8); token ids ``[S, L]``, each row a sample; or an
            iterable, a DataLoader say, of strings, of token tensors ``[L]`` or ``[B, L]``, of
            tuples that begin with one, or of dicts that hold one as ``"input_ids"`` and perhaps an
            ``"attention_mask"``, which says what is padding and is left out.
        tokenizer: needed for strings and files.
        nsamples: use only so many samples; None for all.
        seqlen: cut each sample to so many tokens.
        seed: None takes the first ``nsamples`` and reads no further; a number draws them at random
            from all, without replacement.

    Returns:
        int64 token ids ``[1, L]`` with ``1 <= L <= seqlen``, at least one of them. That some in
        memory are shorter than ``seqlen`` is logged as a warning.

    Raises:
        OSError: the file cannot be read (FileNotFoundError: it is not there).
        TypeError: the data or one of its items is nothing of the above, or ids are no int32 or
            int64.
        ValueError: there is no token; a file has fewer than ``seqlen``, another ending, or a line
            that is no such JSON object; a tokenizer is needed; a shape or a number is wrong.
    """
    if calibration is None:
        raise ValueError("calibration text is needed; pass calibration=")
    if nsamples is not None and nsamples < 1:
        raise ValueError(f"nsamples must be at least 1, got {nsamples}")
    if seqlen < 1:
        raise ValueError(f"seqlen must be at least 1, got {seqlen}")
    if isinstance(calibration, (str, os.PathLike)):
        return _draw(_from_file(Path(calibration), tokenizer, seqlen), nsamples, seed)
    if not isinstance(calibration, Iterable):
        raise TypeError(
            "calibration must be a file's name, token tensors or strings, got "
            f"{type(calibration).__name__}"
        )
    if isinstance(calibration, Tensor) and calibration.dim() == 1:
        calibration = calibration[None]
    chosen = _draw((row for item in calibration for row in _rows(item)), nsamples, seed)
    samples = [_tokenize(row, tokenizer) if isinstance(row, str) else row for row in chosen]
    samples = [sample[None, :seqlen] for sample in samples if len(sample)]
    if not samples:
        raise ValueError("calibration holds no tokens")
    lengths = [sample.shape[1] for sample in samples]
    if min(lengths) < seqlen:
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


def samples_for(
    model: nn.Module,
    calibration: Calibration | None,
    tokenizer: Tokenizer | None,
    nsamples: int | None,
    seqlen: int,
    seed: int | None,
) -> list[Tensor]:
    """:func:`token_samples`, checked against the model's vocabulary.

    Raises:
        ValueError: also if a token id is outside the vocabulary.
    """
    samples = token_samples(calibration, tokenizer, nsamples, seqlen, seed)
    for sample in samples:
        check_token_ids(sample, model)
    return samples


def _rows(item: Any) -> Iterator[str | Tensor]:
    """The sequences in one item of an iterable: strings, or int64 ids ``[L]``."""
    if isinstance(item, str):
        yield item
        return
    mask = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise TypeError(
                'a calibration item that is a dict must have "input_ids", got the keys '
                f"{sorted(map(str, item))}"
            )
        mask = item.get("attention_mask")
        item = torch.as_tensor(item["input_ids"])
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


def _from_file(path: Path, tokenizer: Tokenizer | None, seqlen: int) -> Iterator[Tensor]:
    """Samples ``[1, seqlen]`` of a file's documents, laid end to end; what is left is dropped."""
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"the calibration file must end in .txt or .jsonl, got {str(path)!r} (several texts "
            "are passed as a list)"
        )
    left = torch.empty(0, dtype=torch.int64)
    found = False
    for document in _documents(path):
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
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".txt":
            yield file.read()
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: no JSON: {error}") from None
            if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
                raise ValueError(f'{path}, line {number}: must be an object with a string "text"')
            yield entry["text"]


def _tokenize(text: str, tokenizer: Tokenizer | None) -> Tensor:
    if tokenizer is None:
        raise ValueError("calibration strings need a tokenizer; pass tokenizer=")
    return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
