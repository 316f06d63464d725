"""The operators of ``torch.ops.flash_llm`` in Python: typed wrappers and fakes.

``y = act(x @ w.T + bias)`` for a packed sparse ``w``, and the conversions from and to dense. A
packed weight of any format is eight integers and two tensors (:class:`PackedWeight`). The operators
take these as separate arguments, so that ``torch.compile``, CUDA graphs and the dispatcher see
plain tensors and ints, and no call has to read a buffer from the device.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from flash_llm import _extension, quantize

STORED_VALUES = ("16-bit", "int8", "fp8_e4m3", "int4")
"""What a packed weight can store: its elements, or values of fewer bits and scales: one for each
row, or of int4 values one for each row and 128 columns. Pruning can round to more types
(:data:`flash_llm.quantize.GRIDS`)."""

# Number in headers for each kind of values and dtype of the weight (csrc/format/value_type.h).
_VALUE_TYPES: dict[tuple[str, torch.dtype], int] = {
    ("16-bit", torch.float16): 1,
    ("16-bit", torch.bfloat16): 2,
    ("int8", torch.float16): 3,
    ("int8", torch.bfloat16): 4,
    ("fp8_e4m3", torch.float16): 5,
    ("fp8_e4m3", torch.bfloat16): 6,
    ("int4", torch.float16): 7,
    ("int4", torch.bfloat16): 8,
}

VALUE_DTYPES: dict[int, torch.dtype] = {n: dtype for (_, dtype), n in _VALUE_TYPES.items()}
"""Dtype of the weight for each ``PackedHeader.value_type``."""

_VALUES_OF_TYPE: dict[int, str] = {n: values for (values, _), n in _VALUE_TYPES.items()}
_VALUE_BITS = {
    values: quantize.GRIDS[values].bits if values in quantize.GRIDS else 16
    for values in STORED_VALUES
}

X_QUANTIZATIONS = ("none", "dynamic")
"""How ``spmm`` may round ``x``."""

ACTIVATIONS = ("none", "relu", "gelu", "silu")
"""Activations that ``spmm`` can apply to its result."""

_Packed = TypeVar("_Packed", bound="PackedWeight")


class PackedHeader(NamedTuple):
    """The eight integers that describe a packed weight (``csrc/format/packed_header.h``).

    Attributes:
        magic: ``"FLASHLLM"`` as a little-endian integer.
        version: of the format, raised when the meaning of a stored byte changes.
        format: which packed format; ``PackedWeight.FORMAT_ID`` of its class.
        value_type: key of :data:`VALUE_DTYPES`; says the dtype and what the values are.
        m: rows of the weight, out_features.
        k: columns of the weight, in_features.
        nnz: stored values that are not zero.
        payload_words: 32-bit words in the payload, padding included.
    """

    magic: int
    version: int
    format: int
    value_type: int
    m: int
    k: int
    nnz: int
    payload_words: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the dense weight."""
        return VALUE_DTYPES[self.value_type]

    @property
    def values(self) -> str:
        """What is stored; one of :data:`STORED_VALUES`."""
        return _VALUES_OF_TYPE[self.value_type]

    @property
    def value_bits(self) -> int:
        """Bits of one stored value."""
        return _VALUE_BITS[self.values]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in [0, 1]; 1.0 for a weight without elements."""
        return 1.0 - self.nnz / (self.m * self.k) if self.m and self.k else 1.0

    def to_tensor(self, device: torch.device | str | None = None) -> Tensor:
        """Return the header as the int64[8] tensor of checkpoints."""
        return torch.tensor(self, dtype=torch.int64, device=device)

    @staticmethod
    def from_tensor(tensor: Tensor) -> PackedHeader:
        """Read a header tensor; one that is not on the CPU is copied from its device.

        Args:
            tensor: int64[8].

        Raises:
            TypeError: the dtype is not int64.
            ValueError: the tensor is not one-dimensional with 8 elements, is on the meta device, or
                has a storage smaller than that.
        """
        if tensor.dtype != torch.int64:
            raise TypeError(f"flash_llm: header must be int64, got {tensor.dtype}")
        if tensor.shape != (len(PackedHeader._fields),):
            raise ValueError(
                f"flash_llm: header must have shape [{len(PackedHeader._fields)}], "
                f"got {list(tensor.shape)}"
            )
        if tensor.is_meta:
            raise ValueError("flash_llm: header must hold values, got a tensor on the meta device")
        elements = tensor.storage_offset() + (len(tensor) - 1) * tensor.stride(0) + 1
        if tensor.untyped_storage().nbytes() < elements * tensor.itemsize:
            raise ValueError(
                f"flash_llm: header needs a storage of {elements * tensor.itemsize} bytes, "
                f"got one of {tensor.untyped_storage().nbytes()}"
            )
        return PackedHeader(*tensor.tolist())


@dataclasses.dataclass(frozen=True)
class PackedStats:
    """What a packed weight takes. Each format has a subclass that adds how its nonzeros lie.

    Attributes:
        nnz: stored values that are not zero.
        sparsity: fraction of zeros in [0, 1].
        dense_bytes: bytes of the dense weight in the same dtype.
        packed_bytes: bytes of header, offsets and payload.
        bytes_per_element: ``packed_bytes`` over the number of dense elements; dense is 2.
    """

    nnz: int
    sparsity: float
    dense_bytes: int
    packed_bytes: int
    bytes_per_element: float


@dataclasses.dataclass(frozen=True, eq=False)
class PackedWeight:
    """A packed ``[M, K]`` weight: header and buffers. Each format is one subclass.

    A subclass registers its format under its name and number. The operators, ``SparseLinear`` and
    ``sparsify_`` use formats only through this class.

    Attributes:
        header: shape, dtype, format and counts, as Python integers.
        offsets: int32, one-dimensional; the begin of each tile in the payload.
        payload: int32[header.payload_words], on the device of ``offsets``.
    """

    header: PackedHeader
    offsets: Tensor
    payload: Tensor

    FORMAT: ClassVar[str]
    FORMAT_ID: ClassVar[int]
    PARTS: ClassVar[tuple[str, ...]] = ("header", "offsets", "payload")
    """Names of the tensors of a stored weight, in the order of :meth:`parts`."""

    def __init_subclass__(cls) -> None:
        """Register the format under its name and its number."""
        super().__init_subclass__()
        _CLASS_OF_FORMAT[cls.FORMAT] = cls
        _CLASS_OF_ID[cls.FORMAT_ID] = cls

    @classmethod
    def num_offsets(cls, m: int, k: int, value_type: int) -> int:
        """Length of ``offsets``: one more than the tiles of an ``[m, k]`` weight.

        Args:
            m: rows.
            k: columns.
            value_type: key of :data:`VALUE_DTYPES` that the format holds.
        """
        tile_m, tile_k = cls._tile_size(value_type)
        return ((m + tile_m - 1) // tile_m) * ((k + tile_k - 1) // tile_k) + 1

    @staticmethod
    def class_for(fmt: str | int) -> type[PackedWeight]:
        """Return the class of a format.

        Args:
            fmt: a format's name (``"tiled_csl"``) or its number in a header.

        Raises:
            ValueError: no format has this name.
            NotImplementedError: no format of this build has this number.
        """
        if isinstance(fmt, str):
            if fmt not in _CLASS_OF_FORMAT:
                known = " or ".join(f'"{name}"' for name in _CLASS_OF_FORMAT)
                raise ValueError(f'flash_llm: format must be {known}, got "{fmt}"')
            return _CLASS_OF_FORMAT[fmt]
        if fmt not in _CLASS_OF_ID:
            known = ", ".join(f"{cls.FORMAT_ID} ({cls.FORMAT})" for cls in _CLASS_OF_ID.values())
            raise NotImplementedError(
                f"flash_llm: header names format {fmt}, this build knows {known}"
            )
        return _CLASS_OF_ID[fmt]

    @classmethod
    def empty(
        cls,
        m: int,
        k: int,
        *,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        payload_words: int = 0,
        values: str = "16-bit",
    ) -> PackedWeight:
        """Return a packed weight of zeros without making a dense one.

        Args:
            m: rows.
            k: columns.
            dtype: float16 or bfloat16.
            device: where the buffers live; ``"meta"`` for placeholders.
            payload_words: length of the payload; more than 0 only on the meta device, for a weight
                that is loaded later.
            values: one of :data:`STORED_VALUES`.

        Returns:
            A weight of class ``cls`` that :meth:`validate` accepts (meta placeholders aside).

        Raises:
            ValueError: ``m`` or ``k`` is negative, or ``payload_words`` is negative, or not 0 off
                the meta device, or ``values`` is unknown.
            TypeError: ``dtype`` is neither float16 nor bfloat16, or the format does not hold such
                values.
        """
        if m < 0 or k < 0:
            raise ValueError(f"flash_llm: m and k must not be negative, got {m} and {k}")
        extension = _extension.require()
        value_type = value_type_of(dtype, values)
        check_holds("flash_llm", cls.FORMAT, dtype, values)
        num_offsets = cls.num_offsets(m, k, value_type)
        offsets = torch.zeros(num_offsets, dtype=torch.int32, device=device)
        if payload_words < 0 or (payload_words and not offsets.is_meta):
            raise ValueError(
                "flash_llm: payload_words must be 0, or positive on the meta device, got "
                f"{payload_words} on {offsets.device}"
            )
        header = PackedHeader(
            magic=extension.PACKED_MAGIC,
            version=int(extension.FORMATS[cls.FORMAT]["version"]),
            format=cls.FORMAT_ID,
            value_type=value_type,
            m=m,
            k=k,
            nnz=payload_words,
            payload_words=payload_words,
        )
        # Any payload_words are allowed, but not any values.
        check_header("flash_llm", header._replace(nnz=0, payload_words=0))
        payload = torch.empty(payload_words, dtype=torch.int32, device=offsets.device)
        return cls(header, offsets, payload)

    @classmethod
    def from_dense(cls: type[_Packed], weight: Tensor, *, values: str = "16-bit") -> _Packed:
        """Pack a dense weight; see :func:`pack`.

        Args:
            weight: ``[M, K]`` float16 or bfloat16, CPU or CUDA, any strides.
            values: one of :data:`STORED_VALUES`.

        Raises:
            ValueError: ``weight`` is not two-dimensional, or ``values`` is unknown.
            TypeError: its dtype is neither float16 nor bfloat16, or the format does not hold such
                values.
        """
        packed = pack(weight, cls.FORMAT, values=values)
        assert isinstance(packed, cls)
        return packed

    @classmethod
    def from_tensors(
        cls: type[_Packed], header: Tensor | PackedHeader, offsets: Tensor, payload: Tensor
    ) -> _Packed:
        """Build a packed weight from its stored parts, and check every invariant of its format.

        Args:
            header: int64[8] tensor or :class:`PackedHeader`.
            offsets: int32, on any device.
            payload: int32, on the same device.

        Returns:
            A weight of the class that the header's format names.

        Raises:
            ValueError: a size, an offset, a position or a count is wrong, or the header names
                another format than ``cls``.
            TypeError: a dtype or a device is wrong.
            NotImplementedError: the header has a newer version or an unknown format.
        """
        if isinstance(header, Tensor):
            header = PackedHeader.from_tensor(header)
        if not isinstance(header, PackedHeader):
            raise TypeError(
                f"flash_llm: header must be a tensor or a PackedHeader, got {type(header).__name__}"
            )
        _validate(header, offsets, payload)
        packed = PackedWeight.class_for(header.format)(header, offsets, payload)
        if not isinstance(packed, cls):
            raise ValueError(
                f'flash_llm: header must name format "{cls.FORMAT}", got "{packed.FORMAT}"'
            )
        return packed

    def parts(self) -> tuple[Tensor, ...]:
        """Return the tensors that :data:`PARTS` names, including the header as a tensor."""
        return self.header.to_tensor(self.device), self.offsets, self.payload

    @property
    def shape(self) -> torch.Size:
        """``[M, K]`` of the dense weight."""
        return torch.Size((self.header.m, self.header.k))

    @property
    def dtype(self) -> torch.dtype:
        """float16 or bfloat16."""
        return self.header.dtype

    @property
    def values(self) -> str:
        """What is stored; one of :data:`STORED_VALUES`."""
        return self.header.values

    @property
    def device(self) -> torch.device:
        """Where the buffers live."""
        return self.payload.device

    @property
    def nnz(self) -> int:
        """Number of stored values that are not zero."""
        return self.header.nnz

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in [0, 1]."""
        return self.header.sparsity

    @property
    def nbytes(self) -> int:
        """Bytes of header, offsets and payload together."""
        header_bytes = len(self.header) * torch.int64.itemsize
        return header_bytes + self.offsets.nbytes + self.payload.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same weight stored dense, in the same dtype."""
        return self.header.m * self.header.k * self.dtype.itemsize

    def to_dense(self) -> Tensor:
        """Return the dense ``[M, K]`` weight; see :func:`unpack`."""
        return unpack(self)

    def to_quantized(self) -> tuple[Tensor, Tensor]:
        """Return quantised values and scales; see :func:`unpack_quantized`."""
        return unpack_quantized(self)

    def slice(self: _Packed, rows: slice = slice(None), columns: slice = slice(None)) -> _Packed:
        """Return a part of the weight, packed in the same format.

        The result has the bytes of packing ``to_dense()[rows, columns]``; of quantised weights it
        has the values, and their scales do not change. A slice of all columns whose first and last
        row are borders of the format (multiples of 128 rows in ``tiled_csl``, of 512 in ``bitmap``
        and ``gather``, of 4 in ``row_bitmap``, of 16 in ``quantized_bitmap``, or the end) is
        copied. For any other slice the weight is unpacked, cut and packed again, on the same
        device. Columns of int4 values must begin at a multiple of 128, as 128 columns share
        scales; pack ``to_dense()[rows, columns]`` to round the values again instead.

        Args:
            rows: a slice of the M rows, with step 1.
            columns: a slice of the K columns, with step 1.

        Raises:
            ValueError: a step is not 1, or columns of int4 values begin elsewhere.
        """
        bounds = []
        for name, part, size in zip(("rows", "columns"), (rows, columns), self.shape, strict=True):
            first, last, step = part.indices(size)
            if step != 1:
                raise ValueError(f"flash_llm: {name} must be a slice with step 1, got {part}")
            bounds += [first, max(first, last)]
        parts = torch.ops.flash_llm.slice(list(self.header), self.offsets, self.payload, *bounds)
        return cast(_Packed, _from_op(parts))

    @staticmethod
    def concat(weights: Sequence[PackedWeight]) -> PackedWeight:
        """Concatenate the rows of several weights, packed in their format.

        The result has the bytes of packing ``torch.cat([w.to_dense() for w in weights])``; values
        and scales of quantised weights do not change. If all weights but the last end at a border
        of the format (see :meth:`slice`), their buffers are copied. Otherwise the weights are
        unpacked, concatenated and packed again.

        Args:
            weights: at least one; all have the same columns, format, dtype, values and device.

        Raises:
            ValueError: ``weights`` is empty, or the columns differ.
            TypeError: formats, dtypes, values or devices differ, or one is not a packed weight.
        """
        for weight in weights:
            _check_packed("concat", weight)
        headers = [integer for weight in weights for integer in weight.header]
        offsets, payloads = [w.offsets for w in weights], [w.payload for w in weights]
        if not weights:
            raise ValueError("flash_llm::concat: weights must not be empty")
        return _from_op(torch.ops.flash_llm.concat(headers, offsets, payloads))

    @classmethod
    def _tile_size(cls, value_type: int) -> tuple[int, int]:
        """Rows and columns of a tile."""
        sizes = _extension.require().FORMATS[cls.FORMAT]
        return int(sizes["tile_m"]), int(sizes["tile_k"][value_type])

    def _sizes(self) -> dict[str, Any]:
        """The fields of :class:`PackedStats`."""
        elements = self.header.m * self.header.k
        return {
            "nnz": self.nnz,
            "sparsity": self.sparsity,
            "dense_bytes": self.dense_nbytes,
            "packed_bytes": self.nbytes,
            "bytes_per_element": self.nbytes / elements if elements else 0.0,
        }

    def _tile_bytes(self) -> Tensor:
        """Bytes of each tile in the payload, int64, in the order of ``offsets``."""
        unit_words = int(_extension.require().FORMATS[self.FORMAT]["unit_words"])
        return self.offsets.long().diff() * (unit_words * self.payload.itemsize)

    def validate(self) -> None:
        """Check every invariant of the format; see :func:`validate`."""
        validate(self)

    def to(self: _Packed, device: torch.device | str) -> _Packed:
        """Return the same weight with its buffers on ``device``."""
        return dataclasses.replace(
            self, offsets=self.offsets.to(device), payload=self.payload.to(device)
        )

    def __repr__(self) -> str:
        """One line: format, shape, dtype, device, sparsity and size."""
        return (
            f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, nnz={self.nnz}, sparsity={self.sparsity:.4f}, "
            f"nbytes={self.nbytes}, values={self.values})"
        )


_CLASS_OF_FORMAT: dict[str, type[PackedWeight]] = {}
_CLASS_OF_ID: dict[int, type[PackedWeight]] = {}


def check_format(name: str) -> None:
    """Check the argument ``format`` of functions that pack.

    Raises:
        ValueError: ``name`` is neither ``"auto"`` nor the name of a format.
    """
    if name != "auto" and name not in _CLASS_OF_FORMAT:
        known = " or ".join(f'"{known}"' for known in ("auto", *_CLASS_OF_FORMAT))
        raise ValueError(f'flash_llm: format must be {known}, got "{name}"')


def check_header(
    where: str,
    header: Sequence[int],
    *,
    num_offsets: int | None = None,
    payload_words: int | None = None,
) -> None:
    """Refuse a malformed header, and buffers of other lengths than it says.

    Args:
        where: what the message begins with: the operator, module or file that has the header.
        header: the eight integers of a :class:`PackedHeader`.
        num_offsets: length of ``offsets``; None if it is not to be checked.
        payload_words: length of ``payload``; None if it is not to be checked.

    Raises:
        ValueError: the magic number, a size, a count or a length is wrong.
        TypeError: the value type is unknown.
        NotImplementedError: the format is unknown, or its version newer than this build.
        RuntimeError: the extension is missing.
    """
    _extension.require().check_header(where, header, num_offsets, payload_words)


def is_packable(dtype: torch.dtype) -> bool:
    """Whether a weight of this dtype can be packed."""
    return dtype in VALUE_DTYPES.values()


def check_values(name: str) -> None:
    """Check the argument ``values`` of functions that pack.

    Raises:
        ValueError: ``name`` is not one of :data:`STORED_VALUES`.
    """
    if name not in STORED_VALUES:
        known = " or ".join(f'"{known}"' for known in STORED_VALUES)
        raise ValueError(f'flash_llm: values must be {known}, got "{name}"')


def check_x_quantization(name: object) -> None:
    """Check an option ``x_quantization`` that is used in later products.

    Raises:
        ValueError: ``name`` is neither None nor one of :data:`X_QUANTIZATIONS`.
    """
    if name is not None and name not in X_QUANTIZATIONS:
        known = " or ".join(f'"{known}"' for known in X_QUANTIZATIONS)
        raise ValueError(f"flash_llm: x_quantization must be {known}, got {name!r:.50}")


def check_holds(where: str, format: str, dtype: torch.dtype, values: str) -> None:
    """Refuse a format that cannot hold values of a kind.

    Args:
        where: what the message begins with: the function that has the arguments.
        format: the name of a format, or ``"auto"``, which is never refused.
        dtype: of the weight.
        values: one of :data:`STORED_VALUES`.

    Raises:
        ValueError: ``format`` or ``values`` is unknown.
        TypeError: the format does not hold such values, or ``dtype`` is neither float16 nor
            bfloat16.
        RuntimeError: the extension is missing.
    """
    _extension.require().check_holds(where, format, value_type_of(dtype, values))


def format_that_holds(dtype: torch.dtype, values: str) -> str:
    """Return the name of the first format that can hold values of a kind.

    Args:
        dtype: of the weight.
        values: one of :data:`STORED_VALUES`.

    Raises:
        ValueError: ``values`` is unknown.
        TypeError: ``dtype`` is neither float16 nor bfloat16.
        RuntimeError: the extension is missing.
    """
    value_type, formats = value_type_of(dtype, values), _extension.require().FORMATS
    return next(name for name in _CLASS_OF_FORMAT if value_type in formats[name]["tile_k"])


def value_type_of(dtype: torch.dtype, values: str = "16-bit") -> int:
    """Return the number in headers of ``values`` of a weight of ``dtype``.

    Raises:
        ValueError: ``values`` is unknown.
        TypeError: ``dtype`` is neither float16 nor bfloat16.
    """
    check_values(values)
    if not is_packable(dtype):
        raise TypeError(
            f"flash_llm: a packed weight must be torch.float16 or torch.bfloat16, got {dtype}; "
            "cast it first, for instance with .to(torch.bfloat16)"
        )
    return _VALUE_TYPES[values, dtype]


def spmm(
    x: Tensor,
    w: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    x_quantization: str | None = None,
    config: str = "auto",
    ctas: int = 0,
    prefetch: bool = True,
) -> Tensor:
    """Multiply dense tokens by a packed sparse weight: ``y = act(x @ w.T + bias)``.

    The result is that of ``torch.nn.functional.linear`` with the unpacked weight (so Inf times a
    zero of the weight is NaN). The elements of a quantised weight are ``value * scale``, which are
    not rounded to its dtype first, except where N is large and the weight is unpacked. Products are
    accumulated in float32 and rounded once, at the end (Flash-LLM, arXiv 2309.10285, section 4).
    ``x`` and ``bias`` are differentiable; the weight is frozen. The gradient in an ``x`` that is
    rounded ignores the rounding. The backward pass makes a temporary dense copy of the weight and,
    if there is an activation, recomputes its input instead of storing it. Autocast does not cast
    ``x``, which must have the weight's dtype.

    Args:
        x: ``[..., K]``, dtype and device of ``w``, any strides; the leading dimensions are the N
            tokens.
        w: packed ``[M, K]`` weight, float16 or bfloat16.
        bias: ``[M]``, dtype and device of ``x``.
        activation: None or ``"none"``, ``"relu"``, ``"gelu"`` (exact, erf) or ``"silu"``, applied
            in float32 before the final rounding. For large N (the dense product, and the bitmap
            kernel above 64 tokens) the sum is rounded to ``x.dtype`` before the activation, as by
            ``torch.nn.functional.linear``.
        x_quantization: ``"dynamic"`` allows kernels to round each token of ``x`` where that is
            faster: to int8 with int8 weights, on GPUs with int4 ones too, and to e4m3 with fp8
            weights on Hopper. A token's scale is its largest magnitude, but at least 2**-100,
            divided by 127 or 448; elements are multiplied by the inverse of the scale (in float32)
            and rounded to nearest, ties to even. Sums of products of int8 are then exact, of int4
            values those of each 128 columns. Sums of products of e4m3 keep at least 13 bits behind
            the leading one after every 32 products, those of more than 512 tokens are float32. A
            token with an element that is NaN or infinite gives NaN. None and ``"none"`` never round
            ``x``.
        config: ``"auto"`` lets ``explain_plan`` choose; any other name forces that kernel (see
            ``flash_llm._C.plan_names``), for tests and benchmarks.
        ctas: CTAs in the grid of the CUDA kernel, at most one for each tile of work; 0 lets the
            plan choose. The CPU and the dense product ignore it.
        prefetch: whether the kernel may read the weight while the previous kernel in the stream
            still runs (programmatic dependent launch, Hopper). Pass False if that is a kernel of
            your own that writes the buffers of ``w``; after packing and copies True is safe.

    Returns:
        Contiguous ``[..., M]`` of ``x.dtype``.

    Raises:
        ValueError: a shape disagrees with ``w``; ``activation``, ``config`` or
            ``x_quantization`` is unknown, or ``"dynamic"`` is given with a forced kernel; ``ctas``
            lies outside [0, 65535]; a buffer of ``w`` has the wrong length; the storage of a tensor
            is smaller than its shape needs.
        TypeError: dtype or device of ``x``, ``bias`` or a buffer differs from ``w``.
        NotImplementedError: the device is older than sm_80, or this build has no CUDA part.
        RuntimeError: the extension is missing, or CUDA failed.

    Example:
        >>> import torch, flash_llm
        >>> dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]], dtype=torch.bfloat16)
        >>> w = flash_llm.TiledCSL.from_dense(dense)
        >>> flash_llm.spmm(torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16), w, activation="relu")
        tensor([[0., 3.]], dtype=torch.bfloat16)
    """
    _check_packed("spmm", w)
    return spmm_buffers(
        x,
        w.header,
        w.offsets,
        w.payload,
        bias,
        activation=activation,
        x_quantization=x_quantization,
        config=config,
        ctas=ctas,
        prefetch=prefetch,
    )


def spmm_buffers(
    x: Tensor,
    header: PackedHeader,
    offsets: Tensor,
    payload: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    x_quantization: str | None = None,
    config: str = "auto",
    ctas: int = 0,
    prefetch: bool = True,
) -> Tensor:
    """Compute :func:`spmm` with the parts of a weight as separate arguments."""
    extension = _extension.require()
    _check_tensor("spmm", "x", x)
    if bias is not None:
        _check_tensor("spmm", "bias", bias)
    defaults = activation is None and x_quantization is None and config == "auto"
    defaults = defaults and ctas == 0 and prefetch
    if defaults and type(x) is Tensor and not _is_traced():
        y: Tensor = extension.spmm(x, header, offsets, payload, bias)
        return y
    for name, value in (("activation", activation), ("x_quantization", x_quantization)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"flash_llm::spmm: {name} must be a string, got {type(value).__name__}")
    y = torch.ops.flash_llm.spmm(
        *(x, list(header), offsets, payload, bias, "none" if activation is None else activation),
        *(config, ctas, prefetch, "none" if x_quantization is None else x_quantization),
    )
    return y


def explain_format(
    m: int,
    k: int,
    nnz: int,
    *,
    compute_capability: int = 0,
    values: str = "16-bit",
    expected_tokens: int | None = None,
) -> tuple[str, str]:
    """Return the format that ``format="auto"`` chooses, and the reason; needs no GPU.

    Args:
        m: out_features.
        k: in_features.
        nnz: nonzeros of the weight.
        compute_capability: 10 * major + minor of the GPU, 90 for an H100; 0 means the CPU.
        values: one of :data:`STORED_VALUES`.
        expected_tokens: as :func:`pack` takes it.

    Returns:
        The format's name and one sentence.

    Raises:
        TypeError: ``expected_tokens`` is no integer.
        ValueError: ``values`` is unknown, or ``expected_tokens`` is not positive.
        RuntimeError: the extension is missing.
    """
    value_type = value_type_of(torch.float16, values)  # the choice does not depend on the dtype
    tokens = check_expected_tokens(expected_tokens)
    name, reason = _extension.require().explain_format(
        m, k, nnz, compute_capability, value_type, tokens
    )
    return str(name), str(reason)


def check_expected_tokens(expected_tokens: int | None) -> int:
    """Check the argument ``expected_tokens`` of functions that pack, and return it; 0 for None.

    Raises:
        TypeError: it is no integer.
        ValueError: it is not positive.
    """
    if expected_tokens is None:
        return 0
    if not isinstance(expected_tokens, int) or isinstance(expected_tokens, bool):
        raise TypeError(
            f"flash_llm: expected_tokens must be an integer, got {type(expected_tokens).__name__}"
        )
    if expected_tokens < 1:
        raise ValueError(f"flash_llm: expected_tokens must be positive, got {expected_tokens}")
    return expected_tokens


def stored_format(
    weight: Tensor | PackedWeight,
    format: str,
    expected_tokens: int | None,
    values: str = "16-bit",
) -> str:
    """Return the format in which to write a weight to files that GPUs will load too.

    ``"auto"`` remains, so that the weight is packed for the device it is on, unless few tokens are
    expected and a GPU would take ``"gather"`` for them: loading cannot know that.

    Args:
        weight: ``[M, K]``, dense or packed.
        format: a format's name or ``"auto"``.
        expected_tokens: as :func:`pack` takes it.
        values: likewise.
    """
    if format != "auto" or expected_tokens is None:
        return format
    nnz = weight.nnz if isinstance(weight, PackedWeight) else int(torch.count_nonzero(weight))
    m, k = weight.shape
    on_gpu, _ = explain_format(
        *(m, k, nnz), compute_capability=90, values=values, expected_tokens=expected_tokens
    )
    return on_gpu if on_gpu == "gather" else format


def pack(
    dense: Tensor,
    format: str = "auto",
    *,
    values: str = "16-bit",
    expected_tokens: int | None = None,
) -> PackedWeight:
    """Pack the nonzeros of a dense weight.

    Zeros of either sign are dropped, and ``unpack`` returns them as +0; all other values (NaN, Inf
    and subnormals too) are kept bit for bit. CPU and CUDA give the same bytes. The header is
    returned as Python integers, so packing on a GPU waits for the GPU, and ``torch.compile`` breaks
    the graph here.

    Args:
        dense: ``[M, K]`` float16 or bfloat16, CPU or CUDA, any strides, any M, K >= 0.
        format: ``"auto"`` (the format that multiplies fastest on ``dense.device``;
            ``explain_format`` gives the reason), ``"row_bitmap"``, ``"tiled_csl"``, ``"bitmap"``,
            ``"gather"`` or ``"quantized_bitmap"``.
        values: ``"16-bit"`` stores the elements. ``"int8"`` and ``"fp8_e4m3"`` round each row to
            8 bits with one scale, ``"int4"`` to 4 bits with a scale for 128 columns
            (:func:`flash_llm.quantize.round_to_values`); elements that round to 0 are dropped. Only
            ``"row_bitmap"``, for CPUs, and ``"quantized_bitmap"``, for GPUs, hold such values.
        expected_tokens: how many tokens most products will have at most, if that is known: the
            batch size of decoding, for instance. Up to 8, and for large weights of many zeros on a
            GPU, ``"auto"`` then takes ``"gather"``, which is faster for so few tokens and slower
            from 16 tokens on. Ignored for any other format and for quantised values.

    Returns:
        The packed weight, of the format's class, on ``dense.device``; detached from autograd.

    Raises:
        ValueError: ``dense`` is not two-dimensional, is too large for the format's 31-bit offsets,
            has a storage smaller than its shape needs; ``format`` or ``values`` is unknown;
            ``expected_tokens`` is not positive; an element to quantise is NaN or infinite, or too
            large for the type of its scale.
        TypeError: the dtype is neither float16 nor bfloat16; the format does not hold such values;
            ``expected_tokens`` is no integer.
        NotImplementedError: ``dense`` is on CUDA and this build has no CUDA part.
        RuntimeError: another thread or stream changed ``dense`` while it was packed; the extension
            is missing, or CUDA failed.

    Example:
        >>> import torch, flash_llm
        >>> flash_llm.pack(torch.eye(4, dtype=torch.float16)).nnz
        4
    """
    _extension.require()
    _check_dense("pack", dense)
    check_values(values)
    tokens = check_expected_tokens(expected_tokens)
    if values == "16-bit":
        return _from_op(torch.ops.flash_llm.pack(dense.detach(), format, tokens))
    check_holds("flash_llm::pack", format, dense.dtype, values)
    return pack_quantized(*quantize.round_to_values(dense.detach(), values), dense.dtype, format)


def pack_quantized(
    values: Tensor, scales: Tensor, dtype: torch.dtype, format: str = "auto"
) -> PackedWeight:
    """Pack values that are quantised already, as of a quantised checkpoint; nothing is rounded.

    Args:
        values: ``[M, K]``, CPU or CUDA, any strides: int8, or float8_e4m3fn without NaN.
        scales: float32, positive normal numbers: ``[M]``; or ``[M, ceil(K / 128)]``, one for 128
            columns, which makes the values int4. These must be numbers of float16. A scale of
            zeros alone becomes 1. Integers lie in -127 ... 127, or in -7 ... 7 for int4.
        dtype: float16 or bfloat16: of the unpacked weight, and of the x that it multiplies.
        format: as :func:`pack` takes it.

    Returns:
        The packed weight on the device of ``values``.

    Raises:
        ValueError: a value is outside its range or NaN, a scale is not such a number, an element
            overflows ``dtype``, a shape is wrong, or ``format`` is unknown.
        TypeError: a dtype or device is wrong, or the format does not hold quantised values.
        NotImplementedError: ``values`` is on CUDA and this build has no CUDA part.
        RuntimeError: another thread changed ``values``; the extension is missing, or CUDA failed.
    """
    _extension.require()
    for name, tensor in (("values", values), ("scales", scales)):
        _check_dense("pack_quantized", tensor, name)
    if not isinstance(dtype, torch.dtype):  # for which the dispatcher would raise RuntimeError
        raise TypeError(
            f"flash_llm::pack_quantized: dtype must be a torch.dtype, got {type(dtype).__name__}"
        )
    return _from_op(torch.ops.flash_llm.pack_quantized(values, scales.detach(), dtype, format))


def repack(
    w: PackedWeight, format: str = "auto", *, expected_tokens: int | None = None
) -> PackedWeight:
    """Pack a weight in another format; values and scales do not change.

    Args:
        w: packed weight on any device.
        format: as :func:`pack` takes it.
        expected_tokens: likewise.

    Raises:
        TypeError: the format does not hold such values.
    """
    if w.values == "16-bit":
        return pack(unpack(w), format, expected_tokens=expected_tokens)
    return pack_quantized(*unpack_quantized(w), w.dtype, format)


def prune_pack(
    dense: Tensor,
    sparsity: float | None = None,
    *,
    scope: str = "row",
    format: str = "auto",
    values: str = "16-bit",
    expected_tokens: int | None = None,
) -> PackedWeight:
    """Prune by magnitude to a sparsity, then pack; ``dense`` does not change.

    Of equal magnitudes the first in row-major order is pruned first, so CPU and CUDA give the same
    bytes.

    Args:
        dense: ``[M, K]`` float16 or bfloat16, CPU or CUDA, any strides.
        sparsity: fraction of zeros in [0, 1]; may be None for an N:M scope, which implies it.
        scope: ``"row"`` (each row is pruned to the fraction), ``"layer"`` (the matrix as a whole)
            or ``"N:M"``, such as ``"2:4"`` (the N largest of every M consecutive columns are kept).
        format: as :func:`pack` takes it.
        values: as :func:`pack` takes it; the elements that are left are quantised.
        expected_tokens: as :func:`pack` takes it.

    Returns:
        The packed weight on ``dense.device``.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1], NaN, missing or contradicts the scope;
            ``scope``, ``format`` or ``values`` is unknown; ``dense`` is not two-dimensional;
            ``expected_tokens`` is not positive; an element to quantise is NaN or infinite.
        TypeError: the dtype is neither float16 nor bfloat16; the format does not hold such values;
            ``expected_tokens`` is no integer.
        NotImplementedError: ``dense`` is on CUDA and this build has no CUDA part.
        RuntimeError: the extension is missing, or CUDA failed.

    Example:
        >>> import torch, flash_llm
        >>> w = torch.tensor([[1.0, -4.0, 2.0, 3.0]], dtype=torch.float16)
        >>> flash_llm.prune_pack(w, 0.5).to_dense()
        tensor([[ 0., -4.,  0.,  3.]], dtype=torch.float16)
    """
    _extension.require()
    _check_dense("prune_pack", dense)
    if sparsity is not None and not isinstance(sparsity, (int, float)):
        raise TypeError(
            f"flash_llm::prune_pack: sparsity must be a number, got {type(sparsity).__name__}"
        )
    check_values(values)
    tokens = check_expected_tokens(expected_tokens)
    prune = torch.ops.flash_llm.prune_pack
    if values == "16-bit":
        return _from_op(prune(dense.detach(), sparsity, scope, format, tokens))
    check_holds("flash_llm::prune_pack", format, dense.dtype, values)
    pruned = _from_op(prune(dense.detach(), sparsity, scope, "auto"))
    return pack(unpack(pruned), format, values=values)


def unpack(w: PackedWeight) -> Tensor:
    """Return the dense weight.

    Args:
        w: packed ``[M, K]`` weight.

    Returns:
        Contiguous ``[M, K]`` of ``w.dtype`` on ``w.device``; elements that are not stored are +0.
        Of a quantised weight, :func:`flash_llm.quantize.dequantize` of its values and scales.

    Raises:
        ValueError: a buffer has the wrong length or the header is malformed.
        TypeError: a buffer has the wrong dtype or device.
        NotImplementedError: the header has a newer version, or this build has no CUDA part.
        RuntimeError: the extension is missing, or CUDA failed.
    """
    _extension.require()
    _check_packed("unpack", w)
    dense: Tensor = torch.ops.flash_llm.unpack(list(w.header), w.offsets, w.payload)
    return dense


def unpack_quantized(w: PackedWeight) -> tuple[Tensor, Tensor]:
    """Return the values and scales of a quantised weight; :func:`pack_quantized` takes them.

    Args:
        w: packed ``[M, K]`` weight with quantised values.

    Returns:
        Values, int8 or float8_e4m3fn ``[M, K]``, and scales, float32 ``[M]`` or, of int4 values,
        ``[M, ceil(K / 128)]``, on ``w.device``.

    Raises:
        TypeError: the values are not quantised, or a buffer has the wrong dtype or device.
        ValueError: a buffer has the wrong length or the header is malformed.
        NotImplementedError: the header has a newer version, or this build has no CUDA part.
        RuntimeError: the extension is missing, or CUDA failed.
    """
    _extension.require()
    _check_packed("unpack_quantized", w)
    values, scales = torch.ops.flash_llm.unpack_quantized(list(w.header), w.offsets, w.payload)
    return values, scales


def validate(w: PackedWeight) -> None:
    """Check every invariant of the packed format, which its header in ``csrc/format`` lists.

    This reads all of the payload. The operators check only sizes at each call, and are memory-safe
    with buffers that this function would refuse.

    Args:
        w: packed weight on any device.

    Raises:
        ValueError: sizes disagree, offsets decrease or exceed the payload, an element is outside
            its tile or the matrix or is stored twice, or a count is wrong.
        TypeError: a buffer has the wrong dtype or device.
        NotImplementedError: the header has a newer version or an unknown format.
        RuntimeError: the extension is missing, or CUDA failed.
    """
    _check_packed("validate", w)
    _validate(w.header, w.offsets, w.payload)


# The dispatcher would raise RuntimeError for arguments that are no tensors.
def _is_traced() -> bool:
    """Whether calls are recorded in Python, which sees torch's operators but not our functions."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
    )


def _check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"flash_llm::{op}: {name} must be a tensor, got {type(value).__name__}")


def _check_dense(op: str, dense: object, name: str = "dense") -> None:
    _check_tensor(op, name, dense)
    if isinstance(dense, Tensor) and dense.is_meta:
        raise ValueError(
            f"flash_llm::{op}: {name} must hold values, got a tensor on the meta device"
        )


def _check_packed(op: str, value: object) -> None:
    if not isinstance(value, PackedWeight):
        raise TypeError(
            f"flash_llm::{op}: w must be a packed weight (flash_llm.pack makes one), "
            f"got {type(value).__name__}"
        )


def _validate(header: PackedHeader, offsets: Tensor, payload: Tensor) -> None:
    _extension.require()
    torch.ops.flash_llm.validate(list(header), offsets, payload)


def _from_op(parts: tuple[Tensor, Tensor, Tensor]) -> PackedWeight:
    header = PackedHeader.from_tensor(parts[0])
    return PackedWeight.class_for(header.format)(header, parts[1], parts[2])


# The fakes also run if any operand is on the meta device. They refuse all that the kernels refuse,
# so that tracing fails near the cause, and no call returns memory that was never written.
def _check_fake_packed(
    op: str, header: Sequence[int], offsets: Tensor, payload: Tensor
) -> PackedHeader:
    for name, buffer in (("offsets", offsets), ("payload", payload)):
        if buffer.dtype != torch.int32:
            raise TypeError(f"flash_llm::{op}: {name} must be int32, got {buffer.dtype}")
        if buffer.dim() != 1:
            raise ValueError(
                f"flash_llm::{op}: {name} must be one-dimensional, got {buffer.dim()} dimensions"
            )
    _check_fake_device(op, "offsets", offsets, payload)
    # int() makes these lengths constants in compiled code, like the header's integers.
    num_offsets, payload_words = int(offsets.shape[0]), int(payload.shape[0])
    check_header(f"flash_llm::{op}", header, num_offsets=num_offsets, payload_words=payload_words)
    return PackedHeader(*header)


def _check_fake_device(op: str, name: str, tensor: Tensor, payload: Tensor) -> None:
    if tensor.device != payload.device:
        raise TypeError(
            f"flash_llm::{op}: {name} must be on {payload.device} like the weight, "
            f"got {tensor.device}"
        )


def _fake_pack(
    dense: Tensor, format: str = "auto", expected_tokens: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_packed("pack", "dense", dense, format, value_type_of(dense.dtype))


def _fake_packed(
    op: str, name: str, dense: Tensor, format: str, value_type: int
) -> tuple[Tensor, Tensor, Tensor]:
    if dense.dim() != 2:
        raise ValueError(
            f"flash_llm::{op}: {name} must be two-dimensional [M, K], got {dense.dim()} dimensions"
        )
    m, k = dense.shape
    words = torch.library.get_ctx().new_dynamic_size()
    # With "auto" the format, and so the number of tiles, depends on the values.
    num_offsets = (
        torch.library.get_ctx().new_dynamic_size()
        if format == "auto"
        else PackedWeight.class_for(format).num_offsets(m, k, value_type)
    )
    return (
        torch.empty(len(PackedHeader._fields), dtype=torch.int64, device="cpu"),
        dense.new_empty(num_offsets, dtype=torch.int32),
        dense.new_empty(words, dtype=torch.int32),
    )


def _fake_prune_pack(
    dense: Tensor,
    sparsity: float | None = None,
    scope: str = "row",
    format: str = "auto",
    expected_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_pack(dense, format, expected_tokens)


def _fake_pack_quantized(
    values: Tensor, scales: Tensor, dtype: torch.dtype, format: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor, expected in (
        ("values", values, (torch.int8, torch.float8_e4m3fn)),
        ("scales", scales, (torch.float32,)),
    ):
        if tensor.dtype not in expected:
            raise TypeError(
                f"flash_llm::pack_quantized: {name} must be {' or '.join(map(str, expected))}, "
                f"got {tensor.dtype}"
            )
    kind = "fp8_e4m3" if values.dtype != torch.int8 else "int4" if scales.dim() == 2 else "int8"
    value_type = value_type_of(dtype, kind)
    packed = _fake_packed("pack_quantized", "values", values, format, value_type)
    m, k = values.shape
    shape = quantize.scales_shape(m, k, kind)
    if scales.shape != shape:
        raise ValueError(
            f"flash_llm::pack_quantized: scales of {kind} values must have shape {list(shape)}, "
            f"got {list(scales.shape)}"
        )
    return packed


def _fake_unpack_quantized(
    header: list[int], offsets: Tensor, payload: Tensor
) -> tuple[Tensor, Tensor]:
    fields = _check_fake_packed("unpack_quantized", header, offsets, payload)
    if fields.values == "16-bit":
        raise TypeError(f"flash_llm::unpack_quantized: values of {fields.dtype} are not quantised")
    dtype = quantize.stored_dtype(fields.values)
    shape = quantize.scales_shape(fields.m, fields.k, fields.values)
    return (
        payload.new_empty((fields.m, fields.k), dtype=dtype),
        payload.new_empty(shape, dtype=torch.float32),
    )


def _fake_unpack(header: list[int], offsets: Tensor, payload: Tensor) -> Tensor:
    fields = _check_fake_packed("unpack", header, offsets, payload)
    return payload.new_empty((fields.m, fields.k), dtype=fields.dtype)


def _fake_validate(header: list[int], offsets: Tensor, payload: Tensor) -> None:
    _check_fake_packed("validate", header, offsets, payload)
    if payload.is_meta:
        raise ValueError(
            "flash_llm::validate: the weight must hold values, got tensors on the meta device"
        )


def _fake_spmm(
    x: Tensor,
    header: list[int],
    offsets: Tensor,
    payload: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    config: str = "auto",
    ctas: int = 0,
    prefetch: bool = True,
    x_quantization: str = "none",
) -> Tensor:
    fields = _check_fake_packed("spmm", header, offsets, payload)
    if x.dtype != fields.dtype:
        raise TypeError(f"flash_llm::spmm: x must be {fields.dtype}, got {x.dtype}")
    _check_fake_device("spmm", "x", x, payload)
    if x.dim() == 0 or x.shape[-1] != fields.k:
        raise ValueError(
            f"flash_llm::spmm: x must have shape [..., K={fields.k}], got {list(x.shape)}"
        )
    if bias is not None:
        if bias.dtype != x.dtype:
            raise TypeError(f"flash_llm::spmm: bias must be {x.dtype} like x, got {bias.dtype}")
        _check_fake_device("spmm", "bias", bias, payload)
        if bias.dim() != 1 or bias.shape[0] != fields.m:
            raise ValueError(
                f"flash_llm::spmm: bias must have shape [M={fields.m}], got {list(bias.shape)}"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"flash_llm::spmm: activation must be one of {', '.join(ACTIVATIONS)}, "
            f'got "{activation}"'
        )
    if x_quantization not in X_QUANTIZATIONS:
        raise ValueError(
            f'flash_llm::spmm: x_quantization must be "none" or "dynamic", got "{x_quantization}"'
        )
    return x.new_empty((*x.shape[:-1], fields.m))


def _tag_compile_caches() -> None:
    """Make the keys of ``torch.compile``'s caches on the disk depend on our operators' schemas.

    Code in these caches calls the operators by the schemas of the build that compiled it, but torch
    leaves the schemas out of its keys.
    """
    schemas = sorted(
        str(schema)
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("flash_llm::")
        for schema in torch._C._jit_get_schemas_for_operator(name)
    )
    digest = hashlib.sha256("\n".join(schemas).encode()).hexdigest()[:16]
    tag = torch.compiler.config.cache_key_tag  # a user may have set one
    torch.compiler.config.cache_key_tag = f"{tag} flash_llm {digest}".strip()


def _register() -> None:
    torch.library.register_fake("flash_llm::pack", _fake_pack)
    torch.library.register_fake("flash_llm::prune_pack", _fake_prune_pack)
    torch.library.register_fake("flash_llm::pack_quantized", _fake_pack_quantized)
    torch.library.register_fake("flash_llm::unpack_quantized", _fake_unpack_quantized)
    torch.library.register_fake("flash_llm::unpack", _fake_unpack)
    torch.library.register_fake("flash_llm::validate", _fake_validate)
    torch.library.register_fake("flash_llm::spmm", _fake_spmm)
    _tag_compile_caches()


if _extension.available():
    _register()
