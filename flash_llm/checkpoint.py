"""Packed weights in safetensors files: find and check them, make room for them, save and load.

A packed layer's three buffers stand in a file under their names in the model, so the files say
themselves which layers are packed, in which format and how large: ``L.weight_header``,
``L.weight_offsets`` and ``L.weight_payload`` instead of ``L.weight``. Everything that a file claims
is checked before memory of the claimed size is asked for, and errors name the file and the tensor.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flash_llm import _extension, ops
from flash_llm.linear import SparseLinear, is_conv1d, refuse_parts
from flash_llm.ops import PackedHeader, PackedWeight

CHECKPOINT_VERSION = 1
"""Of how packed layers are laid out in files and named in their metadata; formats of packed weights
have versions of their own, in their headers."""
METADATA = {"flash_llm": str(CHECKPOINT_VERSION)}
"""What the safetensors metadata of a file with packed layers holds."""

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
"""Names of a folder's only file, and of the list of several."""
PACKED_PARTS = _HEADER, _OFFSETS, _PAYLOAD = (
    ".weight_header",
    ".weight_offsets",
    ".weight_payload",
)
"""What follows a packed layer's name, instead of ``".weight"``."""


DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""The dtypes of tensors that can be read into a buffer, as safetensors spells them."""


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
    """Return the safetensors files of a folder, in the index's order if there is one.

    Args:
        folder: with ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        FileNotFoundError: it has neither, or a file that the index names is missing.
        ValueError: the index is not what it should be.
    """
    folder = Path(folder)
    index = folder / INDEX_NAME
    if not index.is_file():
        if not (folder / SINGLE_NAME).is_file():
            raise FileNotFoundError(
                f"flash_llm: {folder} has neither {SINGLE_NAME} nor {INDEX_NAME}"
            )
        return [folder / SINGLE_NAME]
    try:
        places: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        files = [folder / name for name in dict.fromkeys(places.values())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"flash_llm: {index} is no index of safetensors files: {error}") from None
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"flash_llm: {index} names {file.name}, which is missing")
    return files


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
        for file in map(Path, files):
            self._read(file)
        self.tensors = frozenset(self._stored)
        self.packed: dict[str, PackedHeader] = {}
        for key in self._stored:
            for suffix in PACKED_PARTS:
                name = key.removesuffix(suffix)
                if name != key and name not in self.packed:
                    self.packed[name] = self._packed_header(name)

    @property
    def files(self) -> list[Path]:
        """The files, in the order given."""
        return list(dict.fromkeys(stored.file for stored in self._stored.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.nbytes for stored in self._stored.values())

    def names(self, file: Path) -> list[str]:
        """Names of the tensors in a file."""
        return [name for name, stored in self._stored.items() if stored.file == file]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._stored[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors spells it, such as ``"BF16"``."""
        return self._stored[name].dtype

    def nbytes_of(self, name: str) -> int:
        """Bytes of a tensor."""
        return self._stored[name].nbytes

    def tensor(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Load one tensor, to the CPU.

        Args:
            name: of the tensor.
            buffer: uint8, contiguous, as long as the tensor or longer; it is read into, and the
                result is a view of it. For one tensor after another this is several times as fast
                as the memory map that safetensors makes, whose pages are faulted in one by one.

        Raises:
            ValueError: the file has been cut short since it was opened.
        """
        stored = self._stored[name]
        if buffer is None or stored.dtype not in DTYPES:
            with _open(stored.file) as handle:
                tensor: Tensor = handle.get_tensor(name)
            return tensor
        raw = buffer[: stored.nbytes]
        left = memoryview(raw.numpy())
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.begin)
            while left:
                count = file.readinto(left)
                if not count:
                    raise ValueError(f"flash_llm: {stored.file} ends within {name}")
                left = left[count:]
        return raw.view(DTYPES[stored.dtype]).reshape(stored.shape)

    def weight(self, name: str) -> PackedWeight:
        """Load the packed weight of a layer, to the CPU, and check it in depth.

        Raises:
            ValueError: it is malformed; the message names the file and the layer.
        """
        parts = [self.tensor(name + suffix) for suffix in (_OFFSETS, _PAYLOAD)]
        try:
            return PackedWeight.from_tensors(self.packed[name], *parts)
        except ValueError as error:
            file = self._stored[name + _PAYLOAD].file
            raise ValueError(f"flash_llm: {name} in {file} is malformed: {error}") from None

    def placeholder(self, name: str) -> PackedWeight:
        """Return a weight on the meta device that is as large as the stored one of a layer."""
        return _placeholder(self.packed[name])

    def _read(self, file: Path) -> None:
        with _open(file) as handle:
            version = (handle.metadata() or {}).get("flash_llm", str(CHECKPOINT_VERSION))
            if not version.isdecimal() or int(version) > CHECKPOINT_VERSION:
                raise NotImplementedError(
                    f"flash_llm: {file} has packed layers in version {version!r}, this flash_llm "
                    f"reads up to {CHECKPOINT_VERSION}"
                )
        # safetensors has checked the header; it does not say where in the file a tensor is.
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            entries = json.loads(opened.read(length))
        entries.pop("__metadata__", None)
        for key, entry in sorted(entries.items()):
            if key in self._stored:
                raise ValueError(f"flash_llm: {key} is in {file} and in {self._stored[key].file}")
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            self._stored[key] = _Stored(file, entry["dtype"], tuple(entry["shape"]), begin, end)

    def _packed_header(self, name: str) -> PackedHeader:
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
        with _open(stored.file) as handle:
            header = PackedHeader.from_tensor(handle.get_tensor(name + _HEADER))
        try:
            expected = _placeholder(header)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise type(error)(
                f"flash_llm: {name + _HEADER} in {stored.file} is wrong: {error}"
            ) from None
        for suffix, tensor in ((_OFFSETS, expected.offsets), (_PAYLOAD, expected.payload)):
            found = self._stored[name + suffix]
            if found.shape != tuple(tensor.shape):
                raise ValueError(
                    f"flash_llm: {name + suffix} in {found.file} must have shape "
                    f"{list(tensor.shape)}, as {name + _HEADER} says, got {list(found.shape)}"
                )
        return header


def make_room_(model: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Swap the layers that a checkpoint holds packed for empty :class:`SparseLinear`, in place.

    Their buffers are on the meta device and as long as the stored ones; the bias parameter is kept.
    Nothing is swapped unless everything fits.

    Args:
        model: with ``nn.Linear`` or Conv1D layers, usually on the meta device.
        checkpoint: what is going to be loaded.
        names: the layers to swap, and the name of each in the checkpoint.

    Raises:
        ValueError: a layer is missing or has another shape; a bias is there and not in the
            checkpoint.
        TypeError: it is no linear layer.
    """
    _swap(
        model,
        {
            name: SparseLinear.from_packed(
                checkpoint.placeholder(stored),
                _linear(model, name, checkpoint, stored)[1],
                validate=False,
            )
            for name, stored in names.items()
        },
    )


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, max_shard_size: str | int = "5GB"
) -> None:
    """Save a model's parameters and buffers as safetensors, packed layers as they are.

    For models of transformers use ``model.save_pretrained(folder)``, which saves the configuration
    too.

    Args:
        model: any module; nothing on the meta device.
        folder: made if it is not there; an earlier checkpoint in it is replaced.
        max_shard_size: of one file, in bytes or such as ``"500MB"``; with more files there is an
            index.

    Raises:
        ValueError: a tensor is on the meta device.
        NotImplementedError: a layer holds one process's part of a packed weight.
        ImportError: huggingface_hub, which writes the files, is not installed.
    """
    from huggingface_hub import save_torch_state_dict

    refuse_parts(model)
    state = model.state_dict()
    absent = [name for name, tensor in state.items() if tensor.is_meta]
    if absent:
        raise ValueError(f"flash_llm.save: {absent[0]} is on the meta device and has no values")
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        state, Path(folder), max_shard_size=max_shard_size, metadata=dict(METADATA)
    )


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load what :func:`save` wrote into a model of the same architecture, in place.

    Linear layers that are packed in the files become :class:`SparseLinear`, with ``format="auto"``.
    Every packed weight is checked in depth, and all names, shapes and dtypes are compared, before
    anything changes.

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
        model.load_state_dict({name: checkpoint.tensor(name)}, strict=False, assign=there.is_meta)
    return model


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"flash_llm: {file} is no whole safetensors file: {error}") from None


def _placeholder(header: PackedHeader) -> PackedWeight:
    """What a header describes, on the meta device; refuses one that describes nothing."""
    extension = _extension.require()
    if header.magic != extension.PACKED_MAGIC:
        raise ValueError(f"magic number must be {extension.PACKED_MAGIC}, got {header.magic}")
    cls = PackedWeight.class_for(header.format)
    version = int(extension.FORMATS[cls.FORMAT]["version"])
    if not 1 <= header.version <= version:
        raise NotImplementedError(
            f'format "{cls.FORMAT}" has version {header.version}, this build reads up to {version}'
        )
    if header.value_type not in ops.VALUE_DTYPES:
        raise TypeError(f"no value type has number {header.value_type}")
    packed = cls.empty(
        header.m, header.k, dtype=header.dtype, device="meta", payload_words=header.payload_words
    )
    return cls(header, packed.offsets, packed.payload)


def _linear(
    model: nn.Module, name: str, checkpoint: Checkpoint, stored: str
) -> tuple[Tensor, nn.Parameter | None]:
    """Weight and bias of the layer that packed layer ``stored`` of the checkpoint is to replace."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"flash_llm: the checkpoint holds a packed {stored}, but the model has no layer {name}"
        ) from None
    header = checkpoint.packed[stored]
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    linear = isinstance(layer, nn.Linear) or is_conv1d(layer)
    if not linear or not isinstance(weight, nn.Parameter):
        raise TypeError(
            f"flash_llm: {name} must be nn.Linear or Conv1D to be packed, got "
            f"{type(layer).__name__}"
        )
    shape = tuple(weight.t().shape if is_conv1d(layer) else weight.shape)
    if shape != (header.m, header.k):
        raise ValueError(
            f"flash_llm: {name} must have shape {list(shape)}, the packed {stored} of the "
            f"checkpoint has {[header.m, header.k]}"
        )
    if weight.dtype != header.dtype:
        raise TypeError(
            f"flash_llm: {name} is {weight.dtype}, but packed as {header.dtype}; build the "
            f"model in {header.dtype}"
        )
    if bias is not None and f"{stored}.bias" not in checkpoint.tensors:
        raise ValueError(f"flash_llm: {name} has a bias, but the checkpoint has no {stored}.bias")
    assert bias is None or isinstance(bias, nn.Parameter)
    return weight, bias


def _swap(model: nn.Module, layers: Mapping[str, SparseLinear]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        layer.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent), child, layer)


def _plain_tensors(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's tensors that the checkpoint holds as they are, after both have been compared."""
    packed = {name + part for name in checkpoint.packed for part in PACKED_PARTS}
    model_state = model.state_dict(keep_vars=True)
    owners: dict[int, list[str]] = {}  # names of one tensor: a file holds it once
    for name, tensor in model_state.items():
        owners.setdefault(id(tensor), []).append(name)
    plain = {}
    for name, tensor in model_state.items():
        if name.removesuffix(".weight") in checkpoint.packed:
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
    for name in sorted(checkpoint.tensors - packed):
        if name not in plain:
            raise ValueError(f"flash_llm.load: the checkpoint has {name}, the model has not")
    return plain
