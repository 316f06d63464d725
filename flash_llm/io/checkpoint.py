"""Packed weights in safetensors files: find and check them, make room for them, save and load.

A packed layer's three buffers stand in a file under their names in the model, so the files say
themselves which layers are packed, in which format and how large: ``L.weight_header``,
``L.weight_offsets`` and ``L.weight_payload`` instead of ``L.weight``. Everything that a file claims
is checked before memory of the claimed size is asked for, and errors name the file and the tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flash_llm import ops
from flash_llm.io.files import (
    TEMPORARY_NAME,
    fingerprint,
    from_json,
    read_json,
    replacing,
    sync_folder,
    write_whole,
)
from flash_llm.linear import BUFFERS, SparseLinear, is_conv1d, refuse_parts
from flash_llm.ops import PackedHeader, PackedWeight

CHECKPOINT_VERSION = 1
"""Of how packed layers are laid out in files and named in their metadata; formats of packed weights
have versions of their own, in their headers."""
METADATA = {"flash_llm": str(CHECKPOINT_VERSION)}
"""What the safetensors metadata of a file with packed layers holds."""

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
"""Names of a folder's only file, and of the list of several."""
PACKED_PARTS = _HEADER, _OFFSETS, _PAYLOAD = tuple(f".{buffer}" for buffer in BUFFERS)
"""What follows a packed layer's name, instead of ``".weight"``."""


DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The dtypes of tensors as safetensors spells them; files may hold others, which torch lacks."""

SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}


# Files that `save` writes besides the single one and the index, and what a kill leaves of them.
_OURS = re.compile(rf"model(-\d+)?-\d{{5}}-of-\d{{5}}\.safetensors|{TEMPORARY_NAME}")


class _Stored(NamedTuple):
    file: Path
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    begin: int  # of its bytes in the file
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def checkpoint_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the safetensors files of a folder: those that transformers would load.

    That is ``model.safetensors`` alone where it is there, else what the index names, in its order.

    Args:
        folder: with ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        FileNotFoundError: it has neither, or a file that the index names is missing.
        ValueError: the index is not what it should be, or names files outside of the folder.
    """
    folder = Path(folder)
    index = folder / INDEX_NAME
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if not index.is_file():
        raise FileNotFoundError(
            f"flash_llm: {folder} has neither {SINGLE_NAME} nor {INDEX_NAME}{_instead(folder)}"
        )
    try:
        places = from_json(dict[str, str], read_json(index).get("weight_map"))
    except ValueError as error:
        raise ValueError(f"flash_llm: {index} is no index of safetensors files: {error}") from None
    files = []
    for name in dict.fromkeys(places.values()):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise ValueError(
                f"flash_llm: {index} names {name!r}, which is no safetensors file in that folder"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(f"flash_llm: {index} names {name}, which is missing")
        files.append(folder / name)
    return files


def _instead(folder: Path) -> str:
    """What there is instead of a checkpoint, for an error."""
    if not folder.exists():
        return ": there is no such folder; download a model of the hub first"
    if not folder.is_dir():
        return ": it is a file, and no folder"
    others = (".bin", ".gguf", ".h5", ".msgpack", ".pt", ".pth", ".safetensors")
    found = sorted(path.name for path in folder.iterdir() if path.suffix in others)
    return f", but {found[0]}; save the model as safetensors first" if found else ""


class Checkpoint:
    """What safetensors files hold, read from their headers; no tensor but packed headers is loaded.

    Args:
        files: all files of the checkpoint.

    Attributes:
        tensors: names of all tensors.
        packed: the header of each packed layer, by the layer's name.

    Raises:
        ValueError: a file is no safetensors file or is cut short; two hold the same tensor; a
            packed layer is incomplete or contradicts itself.
        TypeError: a tensor of a packed layer has the wrong dtype.
        NotImplementedError: a file or a packed layer was written by a newer version.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self._stored: dict[str, _Stored] = {}
        self._names: dict[Path, list[str]] = {}
        self._fingerprints: dict[Path, list[int]] = {}
        for file in map(Path, files):
            self._read(file)
        self.tensors = frozenset(self._stored)
        self.packed = self._read_packed_headers()

    @property
    def files(self) -> list[Path]:
        """The files, in the order given."""
        return list(self._names)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.nbytes for stored in self._stored.values())

    def names(self, file: Path) -> list[str]:
        """Names of the tensors in a file."""
        return list(self._names[file])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._stored[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors spells it, such as ``"BF16"``."""
        return self._stored[name].dtype

    def file_of(self, name: str) -> Path:
        """File that holds a tensor."""
        return self._stored[name].file

    def nbytes_of(self, name: str) -> int:
        """Bytes of a tensor."""
        return self._stored[name].nbytes

    def tensor(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Load one tensor, to the CPU, into memory of its own: the file may change afterwards.

        Args:
            name: of the tensor.
            buffer: as in :meth:`raw`.

        Raises:
            NotImplementedError: torch has no such dtype.
            OSError: the file cannot be read.
            ValueError: the file has been changed since it was opened.
        """
        stored = self._stored[name]
        if stored.dtype not in DTYPES:
            raise NotImplementedError(
                f"flash_llm: {name} in {stored.file} is {stored.dtype}, which cannot be loaded"
            )
        return self.raw(name, buffer).view(DTYPES[stored.dtype]).reshape(stored.shape)

    def raw(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Load the bytes of one tensor as uint8, to the CPU.

        Args:
            name: of the tensor.
            buffer: uint8, contiguous, as long as the tensor or longer; it is read into, and the
                result is a view of it. For one tensor after another this is several times as fast
                as new memory, whose pages are faulted in one by one.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file has been changed since it was opened.
        """
        stored = self._stored[name]
        if buffer is None:
            buffer = torch.empty(stored.nbytes, dtype=torch.uint8, device="cpu")
        raw = buffer[: stored.nbytes]
        left = memoryview(raw.numpy())
        with self._opened(stored.file) as file:
            file.seek(stored.begin)
            while left:
                count = file.readinto(left)  # type: ignore[attr-defined]
                if not count:
                    raise ValueError(f"flash_llm: {stored.file} ends within {name}")
                left = left[count:]
        return raw

    def weight(self, name: str) -> PackedWeight:
        """Load the packed weight of a layer, to memory of its own, and check it in depth.

        Raises:
            ValueError: it is malformed; the message names the file and the layer.
        """
        parts = [
            self.tensor(key, torch.empty(self.nbytes_of(key), dtype=torch.uint8))
            for key in (name + _OFFSETS, name + _PAYLOAD)
        ]
        try:
            return PackedWeight.from_tensors(self.packed[name], *parts)
        except ValueError as error:
            file = self._stored[name + _PAYLOAD].file
            raise ValueError(f"flash_llm: {name} in {file} is malformed: {error}") from None

    def placeholder(self, name: str) -> PackedWeight:
        """Return a weight on the meta device that is as large as the stored one of a layer."""
        header = self.packed[name]
        empty = PackedWeight.class_for(header.format).empty(
            header.m,
            header.k,
            dtype=header.dtype,
            device="meta",
            payload_words=header.payload_words,
        )
        return dataclasses.replace(empty, header=header)

    @contextlib.contextmanager
    def _opened(self, file: Path) -> Iterator[BinaryIO]:
        """Open a file, and refuse it in the end if it is not what its header was read from."""
        try:
            with file.open("rb", buffering=0) as opened:
                yield opened
                if fingerprint(os.fstat(opened.fileno())) != self._fingerprints[file]:
                    raise ValueError(f"flash_llm: {file} has been changed since it was opened")
        except OSError as error:
            error.filename = error.filename or str(file)
            raise

    def _read(self, file: Path) -> None:
        self._names[file] = []
        self._fingerprints[file] = fingerprint(file.stat())
        with _open(file) as handle:
            version = (handle.metadata() or {}).get("flash_llm", str(CHECKPOINT_VERSION))
            if version not in map(str, range(CHECKPOINT_VERSION + 1)):
                raise NotImplementedError(
                    f"flash_llm: {file} has packed layers in version {version!r}, this flash_llm "
                    f"reads up to {CHECKPOINT_VERSION}"
                )
        # safetensors has checked the header; it does not say where in the file a tensor is.
        with self._opened(file) as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            entries = json.loads(opened.read(length))
        entries.pop("__metadata__", None)
        for key, entry in sorted(entries.items()):
            if key in self._stored:
                raise ValueError(f"flash_llm: {key} is in {file} and in {self._stored[key].file}")
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            self._stored[key] = _Stored(file, entry["dtype"], tuple(entry["shape"]), begin, end)
            self._names[file].append(key)

    def _read_packed_headers(self) -> dict[str, PackedHeader]:
        """The checked header of each packed layer; every file is opened once."""
        names = {
            key.removesuffix(suffix): None
            for key in self._stored
            for suffix in PACKED_PARTS
            if key.endswith(suffix)
        }
        for name in names:
            self._check_parts(name)
        headers = {}
        for file, keys in self._names.items():
            layers = [key.removesuffix(_HEADER) for key in keys if key.endswith(_HEADER)]
            if not layers:
                continue
            with self._opened(file) as opened:
                for name in layers:
                    opened.seek(self._stored[name + _HEADER].begin)
                    integers = struct.unpack("<8q", opened.read(64))
                    headers[name] = PackedHeader(*integers)
                    ops.check_header(
                        f"flash_llm: {name} in {file}",
                        headers[name],
                        num_offsets=self.shape(name + _OFFSETS)[0],
                        payload_words=self.shape(name + _PAYLOAD)[0],
                    )
        return {name: headers[name] for name in names}

    def _check_parts(self, name: str) -> None:
        """Refuse a packed layer without all of its parts, or with others."""
        dtypes = {_HEADER: "I64", _OFFSETS: "I32", _PAYLOAD: "I32"}
        for suffix, dtype in dtypes.items():
            if name + suffix not in self._stored:
                there = next(s for s in dtypes if name + s in self._stored)
                raise ValueError(
                    f"flash_llm: {self._stored[name + there].file} has {name + there}, but "
                    f"{name + suffix} is missing"
                )
            stored = self._stored[name + suffix]
            if stored.dtype != dtype:
                raise TypeError(
                    f"flash_llm: {name + suffix} in {stored.file} must be {dtype}, "
                    f"got {stored.dtype}"
                )
            if len(stored.shape) != 1:
                raise ValueError(
                    f"flash_llm: {name + suffix} in {stored.file} must have one dimension, got "
                    f"shape {list(stored.shape)}"
                )
        stored = self._stored[name + _HEADER]
        if stored.shape != (len(PackedHeader._fields),):  # before it is loaded
            raise ValueError(
                f"flash_llm: {name + _HEADER} in {stored.file} must have shape "
                f"[{len(PackedHeader._fields)}], got {list(stored.shape)}"
            )
        if name + ".weight" in self._stored:
            raise ValueError(
                f"flash_llm: {name} is packed in {stored.file}, but {name}.weight is in "
                f"{self._stored[name + '.weight'].file} too"
            )


def make_room_(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Swap the layers that a checkpoint holds packed for empty :class:`SparseLinear`, in place.

    Their buffers are on the meta device and as long as the stored ones; the bias parameter is kept.
    Nothing is swapped unless everything fits. A layer that is float16 or bfloat16 in the model may
    be the other one in the checkpoint; whoever loads it casts it.

    Args:
        model: with ``nn.Linear`` or Conv1D layers, usually on the meta device.
        checkpoint: what is going to be loaded.
        names: the layers to swap, and the name of each in the checkpoint.

    Raises:
        ValueError: a layer is missing or has another shape.
        TypeError: it is no linear layer, or neither float16 nor bfloat16 in the model.
    """
    swaps = {}
    for name, stored in names.items():
        weight, bias = _linear(model, name, checkpoint, stored)
        if not ops.is_packable(weight.dtype):
            raise _other_dtype(name, weight, checkpoint, stored)
        swaps[name] = SparseLinear.from_packed(checkpoint.placeholder(stored), validate=False)
        swaps[name].register_parameter("bias", bias)
    _swap(model, swaps)


class TensorWriter:
    """Writes a safetensors file tensor by tensor: room for its header is left at the beginning.

    The library's own functions want all tensors at once. (The format: 8 bytes of length, a JSON
    header of names, dtypes, shapes and offsets, which may end in spaces, then the data.)

    Args:
        file: empty, open for writing.
        names: of the tensors; each may be written as itself or as the three parts of a packed one.
    """

    def __init__(self, file: BinaryIO, names: Iterable[str]) -> None:
        self._file = file
        self._entries: dict[str, dict[str, Any]] = {}
        self._header_bytes = 4096 + sum(3 * (512 + len(json.dumps(name))) for name in names)
        self._position = 0

    def __enter__(self) -> TensorWriter:
        self._file.seek(8 + self._header_bytes)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, of any device.

        Raises:
            TypeError: safetensors has no name for its dtype.
        """
        if tensor.dtype not in SPELLINGS:
            raise TypeError(f"flash_llm: {name} is {tensor.dtype}, which safetensors cannot hold")
        values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        raw = values.reshape(-1).view(torch.uint8)
        self.add_raw(name, raw, SPELLINGS[tensor.dtype], tuple(tensor.shape))

    def add_raw(self, name: str, raw: Tensor, dtype: str, shape: tuple[int, ...]) -> None:
        """Append a tensor's bytes, which are uint8; ``dtype`` as safetensors spells it."""
        begin, self._position = self._position, self._position + raw.numel()
        self._entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [begin, self._position],
        }
        self._file.write(raw.numpy().data)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        header = json.dumps({"__metadata__": {"format": "pt", **METADATA}, **self._entries})
        encoded = header.encode()
        assert len(encoded) <= self._header_bytes
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._header_bytes))
        self._file.write(encoded.ljust(self._header_bytes))


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, max_shard_size: str | int = "5GB"
) -> None:
    """Save a model's parameters and buffers as safetensors, packed layers as they are.

    For models of transformers use ``model.save_pretrained(folder)``, which saves the configuration
    too.

    A kill, a full disk or a power failure at any moment leaves a folder that loads as the whole
    earlier checkpoint or as the whole new one: files of an earlier checkpoint are not written to,
    one rename puts the new one in force, and only then are they removed. So both need room for a
    while; where names would collide, the new files are called ``model-2-00001-of-…``.

    Args:
        model: any module; nothing on the meta device.
        folder: made if it is not there; an earlier checkpoint in it is replaced.
        max_shard_size: of one file, in bytes or such as ``"500MB"``; with more files there is an
            index.

    Raises:
        ValueError: a tensor is on the meta device.
        NotImplementedError: a layer holds one process's part of a packed weight.
        TypeError: safetensors has no name for a dtype; an entry of ``state_dict`` is no tensor.
        OSError: the disk is full or cannot be written; the error names the file, and an earlier
            checkpoint is left as it was.
        ImportError: huggingface_hub, which shares the tensors out, is not installed.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    refuse_parts(model)
    folder, state = Path(folder), _once(model.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        split = split_torch_state_dict_into_shards(
            state,
            filename_pattern=_shards(number),
            max_shard_size=max_shard_size,
        )
        files = dict(split.filename_to_tensors)
        if not split.is_sharded:
            files = {SINGLE_NAME: list(state)}
        if not split.is_sharded or not any(os.path.lexists(folder / name) for name in files):
            break
    written: list[Path] = []
    try:
        for file, names in files.items():
            # Wide dtypes first, so that each tensor begins where its dtype must.
            names = sorted(names, key=lambda name: -state[name].element_size())
            with replacing(folder / file) as opened, TensorWriter(opened, names) as writer:
                for name in names:
                    writer.add(name, state[name])
            written.append(folder / file)
    except BaseException:
        for path in written:
            path.unlink()
        raise
    if split.is_sharded:
        total = {"total_size": split.metadata["total_size"], **METADATA}
        index = {"metadata": total, "weight_map": dict(split.tensor_to_filename)}
        write_whole(folder / INDEX_NAME, json.dumps(index, indent=2).encode())
        files[INDEX_NAME] = []
    # The new checkpoint is whole, and in force when an earlier single file, which would be loaded
    # before an index, is gone. An index goes before its files do.
    for name in (SINGLE_NAME, INDEX_NAME, *sorted(os.listdir(folder))):
        ours = name in (SINGLE_NAME, INDEX_NAME) or _OURS.fullmatch(name)
        if ours and name not in files:
            (folder / name).unlink(missing_ok=True)
            sync_folder(folder)


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load what :func:`save` wrote into a model of the same architecture, in place.

    Linear layers that are packed in the files become :class:`SparseLinear`, with ``format="auto"``.
    Every packed weight is checked in depth, and all names, shapes and dtypes are compared, before
    anything changes. What is loaded has memory of its own: the files may change or go afterwards.

    Args:
        model: as it was built, dense; layers on the meta device get what is loaded on the CPU.
        folder: with ``model.safetensors`` or an index of several files.

    Returns:
        The model.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: a file is broken, a packed weight malformed; names or shapes differ from the
            model's.
        TypeError: a dtype differs.
        NotImplementedError: it was written by a newer version.

    Example:
        >>> import tempfile, torch, flash_llm
        >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(256, 256)).half()
        >>> model = build()
        >>> report = flash_llm.sparsify_(model, sparsity=0.75)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     flash_llm.save(model, folder)
        ...     again = flash_llm.load(build(), folder)
        >>> torch.equal(again[0].weight, model[0].weight)
        True
    """
    checkpoint = Checkpoint(checkpoint_files(folder))
    layers = {name: _linear(model, name, checkpoint, name) for name in checkpoint.packed}
    for name, (weight, _) in layers.items():
        if weight.dtype != checkpoint.packed[name].dtype:
            raise _other_dtype(name, weight, checkpoint, name)
    plain = _plain_tensors(model, checkpoint)
    swaps = {}
    for name, (weight, bias) in layers.items():
        packed, device = checkpoint.weight(name), weight.device
        packed = packed if device.type == "meta" else packed.to(device)
        swaps[name] = SparseLinear.from_packed(packed, validate=False)
        # Its values come below, with all that is not packed.
        swaps[name].register_parameter("bias", bias)
        swaps[name].format = "auto"
        swaps[name].refit()
    _swap(model, swaps)
    for name, there in plain.items():  # one by one: no more than one tensor is there twice
        memory = torch.empty(checkpoint.nbytes_of(name), dtype=torch.uint8)
        value = checkpoint.tensor(name, memory)
        model.load_state_dict({name: value}, strict=False, assign=there.is_meta)
    return model


def _shards(number: int) -> str:
    """Pattern of the names of the files of a folder's checkpoint of that number, from 1."""
    return "model{suffix}.safetensors" if number == 1 else f"model-{number}{{suffix}}.safetensors"


def _once(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model that are to be written: of those that are the same, the first."""
    found: dict[str, Tensor] = {}
    places = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"flash_llm.save: {name} is no tensor, but {type(tensor).__name__}")
        if tensor.is_meta:
            raise ValueError(f"flash_llm.save: {name} is on the meta device and has no values")
        what = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        place = (tensor.device, tensor.data_ptr(), what)
        if place not in places or tensor.numel() == 0:
            found[name] = tensor
        places.add(place)
    return found


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"flash_llm: {file} is no whole safetensors file: {error}") from None


def _linear(
    model: nn.Module, name: str, checkpoint: Checkpoint, stored: str
) -> tuple[Tensor, nn.Parameter | None]:
    """Weight and bias of the layer that packed layer ``stored`` of the checkpoint is to replace."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"flash_llm: {checkpoint.file_of(stored + _HEADER)} holds a packed {stored}, but the "
            f"model has no layer {name}"
        ) from None
    header, file = checkpoint.packed[stored], checkpoint.file_of(stored + _HEADER)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    linear = isinstance(layer, nn.Linear) or is_conv1d(layer)
    if not linear or not isinstance(weight, nn.Parameter):
        raise TypeError(
            f"flash_llm: {stored} is packed in {file}, but {name} is of class "
            f"{type(layer).__name__}, neither nn.Linear nor Conv1D"
        )
    shape = tuple(weight.t().shape if is_conv1d(layer) else weight.shape)
    if shape != (header.m, header.k):
        raise ValueError(
            f"flash_llm: {name} must have shape {list(shape)}, the packed {stored} in {file} has "
            f"{[header.m, header.k]}"
        )
    assert bias is None or isinstance(bias, nn.Parameter)
    return weight, bias


def _other_dtype(name: str, weight: Tensor, checkpoint: Checkpoint, stored: str) -> TypeError:
    dtype, file = checkpoint.packed[stored].dtype, checkpoint.file_of(stored + _HEADER)
    return TypeError(
        f"flash_llm: {name} is {weight.dtype}, but packed as {dtype} in {file}; build the model in "
        f"{dtype}"
    )


def _swap(model: nn.Module, layers: Mapping[str, SparseLinear]) -> None:
    """Put layers in the place of those of their names, under all names that these have."""
    names = _names_of_modules(model)
    for name, layer in layers.items():
        old = model.get_submodule(name)
        layer.train(old.training)
        for place in names.get(old, ()):  # a layer that is packed under two names is swapped once
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)


def _names_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _plain_tensors(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's tensors that the checkpoint holds as they are, after both have been compared."""
    packed = {name + part for name in checkpoint.packed for part in PACKED_PARTS}
    model_state = model.state_dict(keep_vars=True)
    swapped = {
        f"{name}.weight"
        for names in _names_of_modules(model).values()
        for name in names
        if any(other in checkpoint.packed for other in names)
    }
    owners: dict[int, list[str]] = {}  # names of one tensor: a file holds it once
    for name, tensor in model_state.items():
        owners.setdefault(id(tensor), []).append(name)
    plain = {}
    for name, tensor in model_state.items():
        if name in swapped:
            continue
        if name not in checkpoint.tensors:
            if any(other in checkpoint.tensors for other in owners[id(tensor)]):
                continue
            raise ValueError(f"flash_llm.load: the model has {name}, the checkpoint has not")
        plain[name] = tensor
        if checkpoint.shape(name) != tuple(tensor.shape):
            raise ValueError(
                f"flash_llm.load: {name} must have shape {list(tensor.shape)}, the checkpoint has "
                f"{list(checkpoint.shape(name))}"
            )
        if checkpoint.dtype(name) != SPELLINGS.get(tensor.dtype):
            raise TypeError(
                f"flash_llm.load: {name} must be {tensor.dtype}, the checkpoint has "
                f"{checkpoint.dtype(name)}"
            )
    for name in sorted(checkpoint.tensors - packed):
        if name not in plain:
            raise ValueError(f"flash_llm.load: the checkpoint has {name}, the model has not")
    return plain
