"""Pack a dense checkpoint file by file, without building the model.

Any folder of safetensors will do in whose weights a pruner has left zeros, and so will what
compressed-tensors wrote as ``sparse-bitmask``. One tensor of each file is in memory at a time. The
new folder is built under a temporary name and renamed when it is whole;
files that were finished before an interruption are kept and not made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flash_llm import hf, ops, sparse_bitmask
from flash_llm.checkpoint import (
    CHECKPOINT_VERSION,
    DTYPES,
    INDEX_NAME,
    METADATA,
    PACKED_PARTS,
    Checkpoint,
    checkpoint_files,
)
from flash_llm.sparsify import (
    LayerReport,
    SparsifyReport,
    compared_size,
    decide,
    matches_name,
    parse_patterns,
)
from flash_llm.table import natural
from flash_llm.unfinished import UnfinishedFolder, refuse_existing, replacing

EVERY_LAYER = "re:.*"
CONVERT_IGNORE = (
    r"re:.*(embed|wte$|wpe$|lm_head$|shared$)",
    r"re:.*(router|gate)$",
)
"""Weights that are no linear layers of their own in the models of transformers: embeddings, heads
that are tied to them, and the routers of experts."""

CARD_NOTE = """
## Packed by flash_llm

Some weights of this checkpoint are packed. Import flash_llm before you load them: transformers does
not find it by itself, and would go on with **random weights** in their place.

```python
import flash_llm

model = flash_llm.from_pretrained("this folder")  # or AutoModelForCausalLM.from_pretrained
```
"""
"""What a model card says of packed weights."""

# Models whose layers are Conv1D, which keeps its weight as [K, M], and the names of those layers.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")

# Other copies of a checkpoint's weights, which would be dense beside packed ones.
_WEIGHT_SUFFIXES = (".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")

_SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class _Options:
    """What decides the bytes of the result; an unfinished folder is continued by the same only."""

    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    format: str
    dtype: str | None
    pack_unprofitable: bool
    conv1d: bool


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    targets: str | Sequence[str] = EVERY_LAYER,
    ignore: str | Sequence[str] = CONVERT_IGNORE,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    pack_unprofitable: bool = False,
    workers: int = 1,
    dry_run: bool = False,
    progress: bool = False,
) -> SparsifyReport:
    """Pack the pruned weights of a dense safetensors folder into another folder.

    Two-dimensional tensors called ``….weight`` are packed where that makes them smaller, unless
    transformers knows the model and could not load them so (it joins the experts of many models
    into one tensor); all else is copied, the other files of the folder too, but no weights in other
    forms, such as ``.bin``.
    ``config.json`` gets a ``quantization_config``, so that transformers loads the result once
    flash_llm is imported, and the model card says so.

    Args:
        src: folder with ``model.safetensors`` or an index of several files.
        dst: folder to make; it must not be there. Until it is whole it is called ``dst.partial``,
            and calling again with the same arguments goes on with that.
        targets: patterns of the layers to pack: a layer's name or the end of one, or ``"re:"`` and
            a regular expression that matches the name from its beginning.
        ignore: patterns of the layers to leave alone; wins over ``targets``.
        format: ``"auto"`` (the fastest on the CPU; a layer is packed anew when it is loaded on a
            device that wants another one), or a format's name.
        dtype: cast float32 weights to this one first, float16 or bfloat16. None leaves them
            dense.
        pack_unprofitable: also pack what that does not shrink.
        workers: files to work on at once; each needs memory for about two tensors.
        dry_run: only say what would be done; nothing is written.
        progress: show a tqdm bar over the files.

    Returns:
        The decision and its reason for each layer, in the natural order of the names.

    Raises:
        FileNotFoundError: ``src`` holds no checkpoint.
        FileExistsError: ``dst`` is there, or ``dst.partial`` is of other work.
        ValueError: a file is broken, or not directly in ``src``; a target matches nothing; a layer
            is packed already; ``format``, ``dtype`` or ``workers`` is wrong.
        OSError: the disk is full or cannot be written; ``src`` is untouched, and what is finished
            stays in ``dst.partial``.

    Example:
        >>> import tempfile, torch, flash_llm
        >>> from pathlib import Path
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 256)).bfloat16()
        >>> model[0].weight.data.masked_fill_(torch.rand(256, 512) < 0.8, 0)
        tensor(...)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     flash_llm.save(model, Path(folder, "dense"))
        ...     report = flash_llm.convert_checkpoint(Path(folder, "dense"), Path(folder, "packed"))
        >>> report.rows[0].decision
        'packed'
    """
    src, dst = Path(src), Path(dst)
    ops.check_format(format)
    if dtype is not None and dtype not in ops.VALUE_DTYPES.values():
        raise ValueError(
            "flash_llm.convert_checkpoint: dtype must be torch.float16 or torch.bfloat16, got "
            f"{dtype}"
        )
    if workers < 1:
        raise ValueError(f"flash_llm.convert_checkpoint: workers must be positive, got {workers}")
    files = checkpoint_files(src)
    source = DenseView(files)
    if source.checkpoint.packed:
        name = next(iter(source.checkpoint.packed))
        raise ValueError(f"flash_llm.convert_checkpoint: {name} in {src} is packed already")
    for file in files:
        if file.parent != src:
            raise ValueError(
                f"flash_llm.convert_checkpoint: the index of {src} names {file}, which is not "
                "directly in that folder"
            )
    config = read_config(src, "flash_llm.convert_checkpoint")
    options = _Options(
        targets=parse_patterns("targets", targets),
        ignore=parse_patterns("ignore", ignore),
        format=format,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        pack_unprofitable=pack_unprofitable,
        conv1d=(config or {}).get("model_type") in _CONV1D_MODELS,
    )
    chosen = dict.fromkeys(choose_layers(source, options.targets, options.ignore), "")
    if config is not None and "model_type" in config:
        chosen |= hf.why_dense(src, chosen)
    caller = "flash_llm.convert_checkpoint"
    refuse_existing(dst, caller)
    unfinished = None if dry_run else UnfinishedFolder(dst, src, vars(options), caller)

    stop = threading.Event()

    def convert(file: Path) -> list[LayerReport]:
        if unfinished is None:
            return _convert_file(source, file, None, chosen, options, stop)
        out, done = unfinished.content / file.name, unfinished.path / f"{file.name}.json"
        if out.is_file() and done.is_file():
            noted = json.loads(done.read_text())
            return [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in noted]
        with replacing(out) as temporary:
            rows = _convert_file(source, file, temporary, chosen, options, stop)
        with replacing(done) as temporary:
            temporary.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
        return rows

    rows: list[LayerReport] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            converted = pool.map(convert, files)
            for found in tqdm(converted, "convert", len(files), unit="file", disable=not progress):
                rows.extend(found)
        except BaseException:  # Ctrl-C too: the files in work are given up at their next tensor
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    if unfinished is not None:
        _complete(unfinished.content, src, files, config)
        unfinished.finish()
    return SparsifyReport(tuple(sorted(rows, key=lambda row: natural(row.name))))


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name such as ``"bfloat16"``; None for None.

    Raises:
        ValueError: it is neither ``"float16"`` nor ``"bfloat16"``.
    """
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in ops.VALUE_DTYPES.values()}
    if name is not None and name not in dtypes:
        raise ValueError(f"dtype must be {' or '.join(dtypes)}, got {name!r}")
    return None if name is None else dtypes[name]


def inspect_checkpoint(folder: str | os.PathLike[str], *, format: str = "auto") -> SparsifyReport:
    """Say what a safetensors folder holds: sparsities, and what packing gives or would give.

    Args:
        folder: dense or packed, of this package or any other.
        format: what dense weights would be packed in; ``"auto"`` as :func:`convert_checkpoint`.

    Returns:
        A row for each packed layer and each two-dimensional dense weight: ``decision`` says how it
        is stored, ``packed_bytes`` what it takes packed. Both kinds are in the natural order of
        their names, packed layers first.

    Raises:
        FileNotFoundError: ``folder`` holds no checkpoint.
        ValueError: a file is broken, or ``format`` unknown.
    """
    ops.check_format(format)
    source = DenseView(checkpoint_files(folder))
    options = _Options((EVERY_LAYER,), (), format, None, False, conv1d=False)
    rows = []
    for name in sorted(source.checkpoint.packed, key=natural):
        packed = source.checkpoint.placeholder(name)
        row = decide(name, packed, pack_unprofitable=True)
        rows.append(dataclasses.replace(row, reason=f"stored so: {compared_size(packed)}"))
    buffer = _buffer(source.checkpoint, source.checkpoint.tensors)
    for name in sorted(choose_layers(source, options.targets, options.ignore), key=natural):
        row, _ = _convert_tensor(name, source.tensor(f"{name}.weight", buffer), options)
        if row.decision == "packed":
            row = dataclasses.replace(row, decision="dense", reason=f"would be {row.reason}")
        rows.append(row)
    return SparsifyReport(tuple(rows))


def read_config(folder: Path, caller: str) -> dict[str, Any] | None:
    """Return what ``config.json`` of a dense checkpoint holds, without what it says of sparsity.

    Args:
        folder: of the checkpoint.
        caller: function named in errors.

    Returns:
        The JSON object; None if there is no such file.

    Raises:
        ValueError: it is no JSON object, or the checkpoint is quantised.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{caller}: {path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{caller}: {path} must hold a JSON object")
    for key in ("quantization_config", "compression_config"):
        found = config.pop(key, None) or {}
        sparse = (found.get("sparsity_config") or {}).get("format") == sparse_bitmask.FORMAT
        if found and not (sparse and not found.get("config_groups")):
            raise ValueError(
                f"{caller}: {folder} is quantised by {found.get('quant_method')!r}; it must be "
                "dense"
            )
    return config


class DenseView:
    """A checkpoint as if it were dense: what is packed is unpacked when it is asked for.

    Args:
        files: all files of the checkpoint.

    Attributes:
        checkpoint: what the files hold.
        bitmasks: shapes of the weights in the format sparse-bitmask, by layer.
        shapes: of all dense and sparse-bitmask weights, by layer.
        names: of all tensors, a packed weight's being ``….weight``.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.checkpoint = Checkpoint(files)
        self.bitmasks = sparse_bitmask.find_weights(self.checkpoint)
        dense = {
            key.removesuffix(".weight"): self.checkpoint.shape(key)
            for key in self.checkpoint.tensors
            if key.endswith(".weight")
        }
        self.shapes = {**dense, **self.bitmasks}
        parts = {name + p for name in self.checkpoint.packed for p in PACKED_PARTS}
        parts |= {name + p for name in self.bitmasks for p in sparse_bitmask.PARTS}
        weights = {f"{name}.weight" for name in (*self.checkpoint.packed, *self.bitmasks)}
        self.names = frozenset((self.checkpoint.tensors - parts) | weights)

    def tensor(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Load a tensor, dense, to the CPU; one that is stored so to ``buffer``, if there is one.

        Args:
            name: one of :attr:`names`.
            buffer: see :meth:`flash_llm.checkpoint.Checkpoint.tensor`.
        """
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in self.checkpoint.packed:
            return self.checkpoint.weight(layer).to_dense()
        if name.endswith(".weight") and layer in self.bitmasks:
            return sparse_bitmask.read_weight(self.checkpoint, layer, self.bitmasks[layer])
        return self.checkpoint.tensor(name, buffer)

    def in_file(self, file: Path) -> Iterator[tuple[str, str]]:
        """Names of the tensors that begin in a file, and their dtypes."""
        for key in self.checkpoint.names(file):
            name, dot, part = key.rpartition(".")
            if name not in self.bitmasks or dot + part not in sparse_bitmask.PARTS:
                yield key, self.checkpoint.dtype(key)
            elif part == "compressed":  # the others may be in other files
                yield f"{name}.weight", self.checkpoint.dtype(key)


def choose_layers(source: DenseView, targets: Sequence[str], ignore: Sequence[str]) -> set[str]:
    """Return the dense layers that may be packed: two-dimensional weights that patterns choose.

    Args:
        source: a checkpoint.
        targets: parsed patterns of the layers to pack.
        ignore: parsed patterns of the layers to leave alone; wins over ``targets``.

    Raises:
        ValueError: a target matches nothing.
    """
    layers = {name for name, shape in source.shapes.items() if len(shape) == 2}
    for pattern in targets:
        if pattern != EVERY_LAYER and not any(matches_name(pattern, name) for name in layers):
            raise ValueError(
                f'flash_llm.convert_checkpoint: target "{pattern}" matches no two-dimensional '
                "weight"
            )
    return {
        name
        for name in layers
        if any(matches_name(pattern, name) for pattern in targets)
        and not any(matches_name(pattern, name) for pattern in ignore)
    }


def copy_other_files(src: Path, folder: Path, files: Sequence[Path]) -> None:
    """Copy what holds no weights: tokenizer, configuration, model card.

    Args:
        src: folder of a checkpoint.
        folder: where the files go.
        files: those of its weights.
    """
    for path in src.iterdir():
        weights = path in files or path.suffix in _WEIGHT_SUFFIXES
        if path.is_file() and not weights and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)


def write_card(src: Path, folder: Path) -> None:
    """Write the model card of a checkpoint with packed weights: that of ``src`` and a note."""
    card = src / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    (folder / "README.md").write_text(text + CARD_NOTE)


def _buffer(checkpoint: Checkpoint, names: Iterable[str]) -> Tensor:
    """Memory for any of these tensors, one at a time."""
    return torch.empty(max(map(checkpoint.nbytes_of, names), default=0), dtype=torch.uint8)


def _convert_file(
    source: DenseView,
    file: Path,
    out: Path | None,
    chosen: Mapping[str, str],
    options: _Options,
    stop: threading.Event,
) -> list[LayerReport]:
    """Convert one file to ``out``, or nowhere; raises InterruptedError when ``stop`` is set.

    ``chosen`` are the layers to report, each with the reason why it stays dense or "".
    """
    rows = []
    names = source.checkpoint.names(file)
    buffer = _buffer(source.checkpoint, names)
    with contextlib.ExitStack() as stack:
        writer = None if out is None else stack.enter_context(_Writer(out, 3 * len(names)))
        for key, dtype in source.in_file(file):
            if stop.is_set():
                raise InterruptedError(f"flash_llm.convert_checkpoint: {file} was given up")
            layer = key.removesuffix(".weight")
            if layer not in chosen or not key.endswith(".weight"):
                if writer is not None:
                    writer.add(key, source.tensor(key, buffer), dtype)
                continue
            tensor = source.tensor(key, buffer)
            row, parts = _convert_tensor(layer, tensor, options, chosen[layer])
            rows.append(row)
            if writer is not None:
                for name, part in parts.items():
                    writer.add(name, part, _SPELLINGS.get(part.dtype, dtype))
    return rows


def _convert_tensor(
    name: str, tensor: Tensor, options: _Options, why_dense: str = ""
) -> tuple[LayerReport, dict[str, Tensor]]:
    """Pack a weight if that pays and there is no reason against it, else give it back."""
    transposed = options.conv1d and name.rpartition(".")[2] in _CONV1D_LAYERS
    shape = tuple(tensor.t().shape if transposed else tensor.shape)
    if tensor.dtype == torch.float32 and options.dtype is not None:
        tensor = tensor.to(getattr(torch, options.dtype))
    if not why_dense and tensor.dtype not in ops.VALUE_DTYPES.values():
        why_dense = f"{tensor.dtype} cannot be packed; for float32 pass dtype="
    if why_dense:
        row = LayerReport(name, shape, None, tensor.nbytes, None, None, "skipped", why_dense)
        return row, {f"{name}.weight": tensor}
    packed = ops.pack(tensor.t() if transposed else tensor, options.format)
    row = decide(name, packed, options.pack_unprofitable)
    if row.decision != "packed":
        return row, {f"{name}.weight": tensor}
    return row, {
        f"{name}.weight_header": packed.header.to_tensor(),
        f"{name}.weight_offsets": packed.offsets,
        f"{name}.weight_payload": packed.payload,
    }


def _complete(folder: Path, src: Path, files: list[Path], config: Mapping[str, Any] | None) -> None:
    """Write the index, the config and the model card, and copy the other files."""
    converted = Checkpoint(folder / file.name for file in files)
    if (src / INDEX_NAME).is_file():
        index = {
            "metadata": {"total_size": converted.nbytes},
            "weight_map": {
                name: file.name for file in converted.files for name in converted.names(file)
            },
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))
    copy_other_files(src, folder, files)
    if config is not None:
        method = {"quant_method": "flash_llm", "version": CHECKPOINT_VERSION}
        changed = {**config, "quantization_config": method} if converted.packed else dict(config)
        (folder / "config.json").write_text(json.dumps(changed, indent=2))
    if converted.packed:
        write_card(src, folder)


class _Writer:
    """Writes a safetensors file tensor by tensor: room for its header is left at the beginning.

    The library's own functions want all tensors at once. (The format: 8 bytes of length, a JSON
    header of names, dtypes, shapes and offsets, which may end in spaces, then the data.)
    """

    def __init__(self, path: Path, most_tensors: int) -> None:
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}
        self._header_bytes = 4096 + 512 * most_tensors
        self._position = 0
        self._file: BinaryIO

    def __enter__(self) -> _Writer:
        self._file = self._path.open("wb")
        self._file.seek(8 + self._header_bytes)
        return self

    def add(self, name: str, tensor: Tensor, dtype: str) -> None:
        """Append a tensor's bytes; ``dtype`` as safetensors spells it."""
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        begin, self._position = self._position, self._position + tensor.nbytes
        self._entries[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, self._position],
        }
        self._file.write(data.data)

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is not None:
                return
            header = json.dumps({"__metadata__": {"format": "pt", **METADATA}, **self._entries})
            encoded = header.encode()
            if len(encoded) > self._header_bytes:
                raise ValueError(
                    f"flash_llm.convert_checkpoint: the names of the tensors in {self._path} take "
                    f"{len(encoded)} bytes, there is room for {self._header_bytes}"
                )
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self._header_bytes))
            self._file.write(encoded.ljust(self._header_bytes))
