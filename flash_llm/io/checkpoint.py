"""Packed weights in safetensors files: finds and checks them, saves and loads models with them.

A packed layer ``L`` is stored as its three buffers ``L.weight_header``, ``L.weight_offsets`` and
``L.weight_payload`` instead of ``L.weight``. So a file says itself which layers are packed, in
which format and of which size. All sizes in a file are checked before memory is allocated for them,
and errors name the file and the tensor or layer.
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
"""Version of the names and metadata of packed layers in files. The formats of packed weights have
their own versions, which are in the headers."""
METADATA = {"flash_llm": str(CHECKPOINT_VERSION)}
"""The safetensors metadata of a file with packed layers."""

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
"""Names of the only file of a folder, and of the index of several files."""
PACKED_PARTS = _HEADER, _OFFSETS, _PAYLOAD = tuple(f".{buffer}" for buffer in BUFFERS)
"""Suffixes of a packed layer's tensors, which replace ``".weight"``."""


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
"""The dtypes of torch by their names in safetensors, which has names for other dtypes too."""

SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}


# Files that `save` writes besides the single file and the index, and their incomplete files if the
# process is killed.
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
    """Return the safetensors files of a folder that transformers would load.

    These are ``model.safetensors`` alone if it exists, else the files of the index, in its order.

    Args:
        folder: with ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        FileNotFoundError: it has neither, or a file that the index names is missing.
        ValueError: the index is malformed, or names files outside of the folder.
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
        file_of = from_json(dict[str, str], read_json(index).get("weight_map"))
    except ValueError as error:
        raise ValueError(
            f"flash_llm: {index} is not an index of safetensors files: {error}"
        ) from None
    files = []
    for name in dict.fromkeys(file_of.values()):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise ValueError(
                f"flash_llm: {index} names {name!r}, which is not a safetensors file in that folder"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(f"flash_llm: {index} names {name}, which is missing")
        files.append(folder / name)
    return files


def _instead(folder: Path) -> str:
    """Describe what a folder has instead of a checkpoint, for an error."""
    if not folder.exists():
        return ": there is no such folder; download a model of the hub first"
    if not folder.is_dir():
        return ": it is a file, not a folder"
    others = (".bin", ".gguf", ".h5", ".msgpack", ".pt", ".pth", ".safetensors")
    found = sorted(path.name for path in folder.iterdir() if path.suffix in others)
    return f", but {found[0]}; save the model as safetensors first" if found else ""


class Checkpoint:
    """The tensors of safetensors files, known from the files' headers.

    Of the tensors themselves only the headers of packed layers are loaded.

    Args:
        files: all files of the checkpoint.

    Attributes:
        tensors: names of all tensors.
        packed: the header of each packed layer, by the layer's name.

    Raises:
        ValueError: a file is not a safetensors file or is truncated; two files have the same
            tensor; a packed layer is incomplete or its parts contradict each other.
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
        """Dtype of a tensor by its name in safetensors, such as ``"BF16"``."""
        return self._stored[name].dtype

    def file_of(self, name: str) -> Path:
        """File that has a tensor."""
        return self._stored[name].file

    def nbytes_of(self, name: str) -> int:
        """Bytes of a tensor."""
        return self._stored[name].nbytes

    def tensor(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Load one tensor to the CPU. Later changes of the file do not affect it.

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
            buffer: uint8, contiguous, at least as long as the tensor. The tensor is read into it,
                and the result is a view of it. Reading many tensors into one buffer is several
                times as fast as into new memory, which costs page faults.

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
        """Load the packed weight of a layer to the CPU, and check every invariant of its format.

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
        """Return a layer's weight on the meta device, with the sizes of the stored one."""
        header = self.packed[name]
        empty = PackedWeight.class_for(header.format).empty(
            header.m,
            header.k,
            dtype=header.dtype,
            device="meta",
            payload_words=header.payload_words,
            values=header.values,
        )
        return dataclasses.replace(empty, header=header)

    @contextlib.contextmanager
    def _opened(self, file: Path) -> Iterator[BinaryIO]:
        """Open a file; raise an error at the end if it has changed since its header was read."""
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
        # safetensors has checked the header, but does not return the tensors' offsets.
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
        """Refuse a packed layer that lacks a part, or that has a dense weight too."""
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
    """Replace the layers that are packed in a checkpoint by :class:`SparseLinear`, in place.

    The buffers of the new layers are on the meta device and as long as the stored ones; the bias
    parameter is kept. All layers are checked before the first is replaced. A layer may be float16
    in the model and bfloat16 in the checkpoint, or the reverse: the caller casts it after loading.

    Args:
        model: with ``nn.Linear`` or Conv1D layers, usually on the meta device.
        checkpoint: that will be loaded.
        names: the layers to replace, and the name of each in the checkpoint.

    Raises:
        ValueError: a layer is missing or has another shape.
        TypeError: a layer is not a linear layer, or neither float16 nor bfloat16 in the model.
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
    """Writes a safetensors file tensor by tensor.

    The functions of safetensors need all tensors at once. This class reserves space for the header
    at the beginning of the file. (The format: 8 bytes of length, a JSON header of names, dtypes,
    shapes and offsets, which may end in spaces, then the data.)

    Args:
        file: empty, open for writing.
        names: of the tensors; each may be written as one tensor or as the three parts of a packed
            weight.
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
            raise TypeError(f"flash_llm: {name} is {tensor.dtype}, which safetensors cannot store")
        values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        raw = values.reshape(-1).view(torch.uint8)
        self.add_raw(name, raw, SPELLINGS[tensor.dtype], tuple(tensor.shape))

    def add_raw(self, name: str, raw: Tensor, dtype: str, shape: tuple[int, ...]) -> None:
        """Append a tensor's bytes, as uint8; ``dtype`` is its name in safetensors."""
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
    """Save a model's parameters and buffers as safetensors, with packed layers in packed form.

    For models of transformers use ``model.save_pretrained(folder)``, which saves the configuration
    too.

    If the process is killed, the disk is full or the power fails at any moment, the folder still
    loads as the whole earlier checkpoint or as the whole new one: the files of an earlier
    checkpoint are not changed, one rename makes the new checkpoint valid, and only then are the old
    files removed. So the disk must have space for both. If names would collide, the new files are
    called ``model-2-00001-of-…``.

    Args:
        model: any module without tensors on the meta device.
        folder: created if it does not exist; an earlier checkpoint in it is replaced.
        max_shard_size: largest size of a file, in bytes or as text such as ``"500MB"``; several
            files have an index.

    Raises:
        ValueError: a tensor is on the meta device.
        NotImplementedError: a layer has only one process's part of a packed weight.
        TypeError: safetensors has no name for a dtype; an entry of ``state_dict`` is not a tensor.
        OSError: the disk is full or cannot be written; the error names the file, and an earlier
            checkpoint is not changed.
        ImportError: huggingface_hub, which distributes the tensors over files, is not installed.
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
            # Wide dtypes first, so that each tensor is aligned for its dtype.
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
    # The new checkpoint is complete. It is valid once an earlier single file, which has precedence
    # over an index, is removed. An index is removed before its files.
    for name in (SINGLE_NAME, INDEX_NAME, *sorted(os.listdir(folder))):
        ours = name in (SINGLE_NAME, INDEX_NAME) or _OURS.fullmatch(name)
        if ours and name not in files:
            (folder / name).unlink(missing_ok=True)
            sync_folder(folder)


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint of :func:`save` into a model of the same architecture, in place.

    Linear layers that are packed in the files become :class:`SparseLinear`, with ``format="auto"``.
    Every invariant of each packed weight is checked, and all names, shapes and dtypes are compared,
    before the model changes. The files may be changed or removed after loading.

    Args:
        model: as it was built, dense; the weights of layers on the meta device are loaded to the
            CPU.
        folder: with ``model.safetensors`` or an index of several files.

    Returns:
        The model.

    Raises:
        FileNotFoundError: the folder has no checkpoint.
        ValueError: a file is damaged, or a packed weight malformed; names or shapes differ from the
            model's.
        TypeError: a dtype differs.
        NotImplementedError: the checkpoint was written by a newer version.

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
        # The bias is loaded below, with all tensors that are not packed.
        swaps[name].register_parameter("bias", bias)
        swaps[name].format = "auto"
        swaps[name].refit()
    _swap(model, swaps)
    for name, there in plain.items():  # one by one, so that only one tensor is in memory twice
        memory = torch.empty(checkpoint.nbytes_of(name), dtype=torch.uint8)
        value = checkpoint.tensor(name, memory)
        model.load_state_dict({name: value}, strict=False, assign=there.is_meta)
    return model


def _shards(number: int) -> str:
    """Pattern of the file names of the ``number``-th checkpoint in a folder, counted from 1."""
    return "model{suffix}.safetensors" if number == 1 else f"model-{number}{{suffix}}.safetensors"


def _once(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model to write: tensors with the same memory only once."""
    found: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"flash_llm.save: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_meta:
            raise ValueError(f"flash_llm.save: {name} is on the meta device and has no values")
        layout = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        key = (tensor.device, tensor.data_ptr(), layout)
        if key not in seen or tensor.numel() == 0:
            found[name] = tensor
        seen.add(key)
    return found


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"flash_llm: {file} is not a complete safetensors file: {error}") from None


def _linear(
    model: nn.Module, name: str, checkpoint: Checkpoint, stored: str
) -> tuple[Tensor, nn.Parameter | None]:
    """Weight and bias of layer ``name``, which the packed layer ``stored`` will replace."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"flash_llm: {checkpoint.file_of(stored + _HEADER)} has a packed {stored}, but the "
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
    """Replace the layers of these names, under all names that they have."""
    names = _names_of_modules(model)
    for name, layer in layers.items():
        old = model.get_submodule(name)
        layer.train(old.training)
        for path in names.get(old, ()):  # none if the layer was already replaced by another name
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)


def _names_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _plain_tensors(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's tensors that are not packed in the checkpoint, after a comparison of both."""
    packed = {name + part for name in checkpoint.packed for part in PACKED_PARTS}
    model_state = model.state_dict(keep_vars=True)
    swapped = {
        f"{name}.weight"
        for names in _names_of_modules(model).values()
        for name in names
        if any(other in checkpoint.packed for other in names)
    }
    owners: dict[int, list[str]] = {}  # all names of a tensor, which a file has only once
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
