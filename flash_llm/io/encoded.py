"""Read dense tensors that other tools store in several parts, or quantised.

compressed-tensors wrote the format ``sparse-bitmask`` until 2026. It stores one bit for each
element and, consecutively, the values whose bit is set. Instead of a tensor ``N`` a file has
``P.shape`` (int64), ``P.bitmask`` (uint8[..., ceil(K / 8)], lowest bit first), ``P.compressed``
(the values) and ``P.row_offsets``, which follow from the bits. Up to version 0.8 the prefix P is
the full name N. Later versions store only weights; P is the layer's name, and N is ``P.weight``.
The format ``sparse-24-bitmask`` has two values for every four columns, zeros too, as
``P.compressed`` [M, K / 2]. It has no ``P.row_offsets``, and ``P.shape`` is [2, 1].

compressed-tensors stores a quantised weight as ``P.weight`` (int8, or float8 of type e4m3), dense
or in one of these formats, and ``P.weight_scale``: one scale, one for each row ([M] or [M, 1]) or
one for each group of columns ([M, groups]). There may be ``P.weight_zero_point`` of the same shape
and ``P.weight_g_idx``, the group of each column. An element is ``(value - zero_point) * scale``.

``torch.nn.utils.prune`` stores ``N_orig`` and ``N_mask`` instead of ``N`` until a mask is made
permanent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_llm.io.checkpoint import DTYPES, Checkpoint

SPARSE_FORMATS = ("dense", "sparse-bitmask", "sparse-24-bitmask")
"""The sparsity formats of compressed-tensors that are read."""
QUANTIZED_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
"""Its formats of quantised weights that are read: each value has a byte of its own."""

_STORED_VALUES = {"I8": "int8", "F8_E4M3": "fp8_e4m3"}
"""What a packed weight can store of quantised values as they are, by their dtype in files."""

_BITMASK_PARTS = (".compressed", ".bitmask", ".shape", ".row_offsets")
_MASKED_PARTS = ("_orig", "_mask")
_QUANTIZED_DTYPES = ("I8", "F8_E4M3")
_SCALE_DTYPES = ("F16", "BF16", "F32")
# Beside a quantised weight: of its values, and of activations, which are not quantised by a fixed
# scale here.
_OF_VALUES = ("weight_scale", "weight_zero_point", "weight_g_idx")
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


class Quantized(NamedTuple):
    """A quantised weight as :func:`flash_llm.ops.pack_quantized` takes it."""

    values: Tensor
    scales: Tensor
    num_clipped: int  # values of -128, which became -127


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tensor that is stored in several parts, or quantised.

    Attributes:
        parts: names of the parts; the tensor is in the file of the first one.
        dtype: of the dense tensor, as safetensors spells it; that of the scales if it is quantised.
        shape: of the dense tensor.
        read: returns the dense tensor.
        values: what a packed weight can store of it without rounding, one of
            :data:`flash_llm.ops.STORED_VALUES`.
        read_quantized: returns its values and scales; None if ``values`` is ``"16-bit"``.
    """

    parts: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    values: str = "16-bit"
    read_quantized: Callable[[], Quantized] | None = None


def find_encoded(checkpoint: Checkpoint) -> dict[str, Encoded]:
    """Return the tensors that are stored in parts or quantised, by the name of the dense tensor.

    Raises:
        ValueError: a part is missing or contradicts the others, or the dense tensor is stored too.
    """
    found = {**_find_bitmasks(checkpoint), **_find_masked(checkpoint)}
    for name, encoded in found.items():
        if name in checkpoint.tensors:
            raise ValueError(f"flash_llm: the files hold both {name} and {encoded.parts[0]}")
    quantized = _find_quantized(checkpoint, found)
    used = {part for one in quantized.values() for part in one.parts}
    return {n: one for n, one in found.items() if one.parts[0] not in used} | quantized


def unread_scheme(method: Mapping[str, Any], quantized: bool) -> str | None:
    """Return what in a ``quantization_config`` this package does not read; None if it reads all.

    Args:
        method: the config, which may hold anything.
        quantized: whether quantised weights are read.
    """
    name = method.get("quant_method")
    if name != "compressed-tensors":
        return f"quant_method {name!r}"
    sparsity = method.get("sparsity_config") or {}
    kind = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if kind not in SPARSE_FORMATS:
        return f"sparsity format {kind!r} of compressed-tensors"
    for key in ("kv_cache_scheme", "transform_config"):
        if method.get(key):
            return f"{key} of compressed-tensors"
    groups = method.get("config_groups")
    if not groups:
        return None
    if not isinstance(groups, dict):
        return f"config_groups {groups!r:.50} of compressed-tensors"
    for group in groups.values():
        own = group.get("format") if isinstance(group, dict) else None
        kind = own or method.get("format")
        if kind not in QUANTIZED_FORMATS or not quantized:
            return f"format {kind!r} of compressed-tensors"
    return None


def check_quantized(checkpoint: Checkpoint, encoded: Mapping[str, Encoded]) -> None:
    """Check that the weights of a quantised checkpoint are those that were understood as such.

    Args:
        checkpoint: its config says that weights are quantised.
        encoded: result of :func:`find_encoded`.

    Raises:
        ValueError: scales belong to no 8-bit weight, or an 8-bit weight has no scales.
    """
    understood = {part for one in encoded.values() for part in one.parts}
    for name in sorted((checkpoint.tensors - understood) | encoded.keys()):
        dtype = encoded[name].dtype if name in encoded else checkpoint.dtype(name)
        file = checkpoint.file_of(encoded[name].parts[0] if name in encoded else name)
        if name.endswith(".weight") and dtype in _QUANTIZED_DTYPES:
            raise ValueError(f"flash_llm: {name} in {file} is {dtype}, but {name}_scale is missing")
        if name.endswith(".weight_scale"):
            weight = name.removesuffix("_scale")
            raise ValueError(
                f"flash_llm: {name} in {file} needs {weight} of dtype "
                f"{' or '.join(_QUANTIZED_DTYPES)}"
            )


def _find_bitmasks(checkpoint: Checkpoint) -> dict[str, Encoded]:
    prefixes = [
        key.removesuffix(".bitmask")
        for key in sorted(checkpoint.tensors)
        if key.endswith(".bitmask") and checkpoint.dtype(key) == "U8"
    ]
    # The same version wrote all tensors, and every model has weights among them.
    whole_names = any(f".{prefix}".endswith(".weight") for prefix in prefixes)
    found = {}
    for prefix in prefixes:
        parts = tuple(prefix + part for part in _BITMASK_PARTS)
        if parts[-1] not in checkpoint.tensors and _is_two_four(checkpoint, parts[0]):
            parts = parts[:-1]
        for part in parts:
            if part not in checkpoint.tensors:
                file = checkpoint.file_of(f"{prefix}.bitmask")
                raise ValueError(f"flash_llm: {file} has {prefix}.bitmask, but {part} is missing")
        shape = _read_shape(checkpoint, prefix, two_four=len(parts) < len(_BITMASK_PARTS))
        bits = checkpoint.shape(f"{prefix}.bitmask")
        if not shape or min(shape) < 0 or bits != (*shape[:-1], (shape[-1] + 7) // 8):
            raise ValueError(
                f"flash_llm: {prefix}.bitmask has shape {list(bits)}, which does not fit a weight "
                f"of shape {list(shape)}"
            )

        def read(prefix: str = prefix, shape: tuple[int, ...] = shape) -> Tensor:
            return _read_bitmask(checkpoint, prefix, shape)

        name = prefix if whole_names else f"{prefix}.weight"
        found[name] = Encoded(parts, checkpoint.dtype(parts[0]), shape, read)
    return found


def _is_two_four(checkpoint: Checkpoint, values: str) -> bool:
    return values in checkpoint.tensors and len(checkpoint.shape(values)) == 2


def _read_shape(checkpoint: Checkpoint, prefix: str, two_four: bool) -> tuple[int, ...]:
    stored = checkpoint.shape(f"{prefix}.shape")
    if stored != (2, 1) if two_four else len(stored) != 1:
        raise ValueError(
            f"flash_llm: {prefix}.shape must "
            + ("have shape [2, 1]" if two_four else "be one-dimensional")
            + f", got shape {list(stored)}"
        )
    return tuple(int(size) for size in checkpoint.tensor(f"{prefix}.shape").flatten().tolist())


def _read_bitmask(checkpoint: Checkpoint, prefix: str, shape: tuple[int, ...]) -> Tensor:
    bits = checkpoint.tensor(f"{prefix}.bitmask").numpy()
    mask = np.unpackbits(bits, axis=-1, count=shape[-1], bitorder="little").astype(bool)
    values = checkpoint.tensor(f"{prefix}.compressed")
    if values.numel() != mask.sum():
        raise ValueError(
            f"flash_llm: {prefix}.compressed must have {int(mask.sum())} values, one for "
            f"each bit set in {prefix}.bitmask, got shape {list(values.shape)}"
        )
    dense = torch.zeros(shape, dtype=values.dtype, device="cpu")
    # Of the same bytes as integers, because torch cannot index all dtypes of one byte.
    bytes_or_same = torch.uint8 if values.itemsize == 1 else values.dtype
    dense.view(bytes_or_same)[torch.from_numpy(mask)] = values.view(bytes_or_same).flatten()
    return dense


def _find_masked(checkpoint: Checkpoint) -> dict[str, Encoded]:
    found = {}
    for key in sorted(checkpoint.tensors):
        name = key.removesuffix("_orig")
        parts = tuple(name + part for part in _MASKED_PARTS)
        if name == key or parts[1] not in checkpoint.tensors:
            continue
        shape, mask_shape = (checkpoint.shape(part) for part in parts)
        if shape != mask_shape:
            raise ValueError(
                f"flash_llm: {parts[1]} must have shape {list(shape)}, like {key}, got "
                f"{list(mask_shape)}"
            )

        def read(parts: tuple[str, ...] = parts) -> Tensor:
            values, mask = (checkpoint.tensor(part) for part in parts)
            # Where the mask is 0, the product is -0.0 for negative and NaN for infinite values.
            return (values * mask.to(values.dtype)).masked_fill_(mask == 0, 0)

        found[name] = Encoded(parts, checkpoint.dtype(key), shape, read)
    return found


def _find_quantized(checkpoint: Checkpoint, encoded: Mapping[str, Encoded]) -> dict[str, Encoded]:
    """Return the quantised weights; their parts may be in ``encoded``."""
    stored = checkpoint.tensors | encoded.keys()
    found = {}
    for scale in sorted(stored):
        name = scale.removesuffix("_scale")
        if not scale.endswith(".weight_scale") or name not in stored:
            continue
        weight = _QuantizedWeight(checkpoint, encoded, name)
        if weight.dtype in _QUANTIZED_DTYPES:
            weight.check()
            values = weight.stored_values()
            found[name] = Encoded(
                weight.parts(),
                weight.scale_dtype,
                weight.shape,
                weight.read,
                values,
                None if values == "16-bit" else weight.read_quantized,
            )
    return found


class _QuantizedWeight:
    """A quantised weight in files.

    Args:
        checkpoint: the files.
        encoded: tensors that are stored in several parts, perhaps some of this weight.
        name: of the dense tensor.
    """

    def __init__(self, checkpoint: Checkpoint, encoded: Mapping[str, Encoded], name: str) -> None:
        self._checkpoint, self._encoded, self.name = checkpoint, encoded, name
        self.dtype, self.shape = self._dtype(name), self._shape(name)
        layer = name.removesuffix("weight")
        self._scale, self._zero_point, self._g_idx = (layer + part for part in _OF_VALUES)
        self.scale_dtype = self._dtype(self._scale)
        beside = [layer + part for part in (*_OF_VALUES, *_OF_ACTIVATIONS)]
        self._tensors = [name, *(part for part in beside if self._is_stored(part))]

    def parts(self) -> tuple[str, ...]:
        """Names of all tensors in the files, first those of the values."""
        return tuple(
            part
            for tensor in self._tensors
            for part in (self._encoded[tensor].parts if tensor in self._encoded else (tensor,))
        )

    def check(self) -> None:
        """Refuse scales of a dtype or shape that is not read.

        Raises:
            ValueError: the message names the file, the tensor and the weight.
        """
        if self.scale_dtype not in _SCALE_DTYPES:
            raise self._error(
                self._scale, f"must be {', '.join(_SCALE_DTYPES)}, got {self.scale_dtype}"
            )
        for part in (self._scale, self._zero_point):
            if self._is_stored(part) and not self._fits(self._shape(part)):
                raise self._error(
                    part,
                    f"has shape {list(self._shape(part))}, which is neither one scale nor one for "
                    f"each row or group of columns of {self.dtype}{list(self.shape)}; those of "
                    "blocks are not read",
                )
        if self._is_stored(self._g_idx) and self._shape(self._g_idx) != self.shape[-1:]:
            raise self._error(
                self._g_idx, f"must have shape {list(self.shape[-1:])}, one for each column"
            )

    def stored_values(self) -> str:
        """What a packed weight can store without rounding."""
        rows_only = _num_groups(self._shape(self._scale)) == 1 and len(self.shape) == 2
        if rows_only and self._zero_points() is None:
            return _STORED_VALUES.get(self.dtype, "16-bit")
        return "16-bit"

    def read(self) -> Tensor:
        """Return the dense tensor, of the dtype of the scales, into which it is rounded once."""
        dense = self._tensor(self.name).float()
        zero_points = self._zero_points()
        if zero_points is not None:
            dense -= self._of_elements(zero_points)
        dense *= self._of_elements(self._scales())
        return dense.to(DTYPES[self.scale_dtype])

    def read_quantized(self) -> Quantized:
        """Return the values, in which -128 is clipped to -127, and a scale for each row."""
        values, scales = self._tensor(self.name), self._scales().flatten()
        num_clipped = 0
        if values.dtype == torch.int8:
            num_clipped = int((values == -128).sum())
            values = values.clamp(min=-127)
        return Quantized(values, scales.expand(self.shape[0]).contiguous(), num_clipped)

    def _scales(self) -> Tensor:
        scales = self._tensor(self._scale).float()
        if not bool(((scales > 0) & scales.isfinite()).all()):
            raise self._error(self._scale, "must hold positive finite numbers")
        return scales

    def _zero_points(self) -> Tensor | None:
        """The zero points; None if there are none or all are 0."""
        if not self._is_stored(self._zero_point):
            return None
        zero_points = self._tensor(self._zero_point).float()
        return zero_points if bool(zero_points.any()) else None

    def _fits(self, shape: tuple[int, ...]) -> bool:
        """Whether scales have a shape that :meth:`_of_elements` can expand."""
        if all(size == 1 for size in shape):
            return True
        if len(shape) == 1 and len(self.shape) == 2:
            return shape == self.shape[:1]
        if len(self.shape) < 2 or shape[:-1] != self.shape[:-1]:
            return False
        groups, columns = shape[-1], self.shape[-1]
        return groups == 1 or (0 < groups <= columns and columns % groups == 0)

    def _of_elements(self, of_groups: Tensor) -> Tensor:
        """Expand what scales or groups have to a shape that broadcasts with the weight."""
        if of_groups.numel() == 1:
            return of_groups.reshape(())
        groups = _num_groups(tuple(of_groups.shape))
        if groups == 1:
            return of_groups.reshape(*self.shape[:-1], 1)
        index = torch.arange(self.shape[-1]) // (self.shape[-1] // groups)
        if self._is_stored(self._g_idx):
            stored = self._tensor(self._g_idx).long()
            if bool((stored >= 0).all()):  # else it was never set
                index = stored
        if int(index.max()) >= groups:
            raise self._error(self._g_idx, f"names group {int(index.max())} of {groups}")
        return of_groups.index_select(-1, index)

    def _is_stored(self, name: str) -> bool:
        return name in self._encoded or name in self._checkpoint.tensors

    def _dtype(self, name: str) -> str:
        encoded = self._encoded
        return encoded[name].dtype if name in encoded else self._checkpoint.dtype(name)

    def _shape(self, name: str) -> tuple[int, ...]:
        encoded = self._encoded
        return encoded[name].shape if name in encoded else self._checkpoint.shape(name)

    def _tensor(self, name: str) -> Tensor:
        encoded = self._encoded
        return encoded[name].read() if name in encoded else self._checkpoint.tensor(name)

    def _error(self, part: str, problem: str) -> ValueError:
        first = self._encoded[part].parts[0] if part in self._encoded else part
        return ValueError(
            f"flash_llm: {part} in {self._checkpoint.file_of(first)}, of the quantised "
            f"{self.name}, {problem}"
        )


def _num_groups(shape: tuple[int, ...]) -> int:
    """Groups of columns that have a scale of their own, by the shape of the scales."""
    return shape[-1] if len(shape) > 1 else 1
