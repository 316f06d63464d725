"""Read any checkpoint as dense tensors, however its weights are stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from flash_llm.io import encoded
from flash_llm.io.checkpoint import PACKED_PARTS, SPELLINGS, Checkpoint
from flash_llm.io.files import read_json

# Models with Conv1D layers, whose weights are [K, M], and the names of these layers.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")


class DenseView:
    """A dense view of a checkpoint: packed weights are unpacked when they are read.

    Args:
        files: all files of the checkpoint.

    Attributes:
        checkpoint: the files as they are stored.
        encoded: tensors that other tools store in several parts or quantised, by the dense
            tensor's name.
        shapes: shape of each dense or encoded weight, by layer name.
        names: names of all tensors; a packed weight is named ``….weight``.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.checkpoint = Checkpoint(files)
        self.encoded = encoded.find_encoded(self.checkpoint)
        self._encoded_parts = {part for e in self.encoded.values() for part in e.parts}
        parts = {name + part for name in self.checkpoint.packed for part in PACKED_PARTS}
        packed = {f"{name}.weight" for name in self.checkpoint.packed}
        plain = self.checkpoint.tensors - parts - self._encoded_parts
        self.names = frozenset(plain | packed | self.encoded.keys())
        self.shapes = {
            name.removesuffix(".weight"): self.shape(name)
            for name in self.names - packed
            if name.endswith(".weight")
        }

    def is_packed(self, name: str) -> bool:
        """Return whether a tensor, one of :attr:`names`, is stored packed."""
        return name.endswith(".weight") and name.removesuffix(".weight") in self.checkpoint.packed

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the dense shape of a tensor, one of :attr:`names`."""
        if self.is_packed(name):
            header = self.checkpoint.packed[name.removesuffix(".weight")]
            return header.m, header.k
        return self.encoded[name].shape if name in self.encoded else self.checkpoint.shape(name)

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor, one of :attr:`names`, as safetensors spells it."""
        if self.is_packed(name):
            return SPELLINGS[self.checkpoint.packed[name.removesuffix(".weight")].dtype]
        return self.encoded[name].dtype if name in self.encoded else self.checkpoint.dtype(name)

    def tensor(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Load a tensor to the CPU as dense; one that is stored dense can go into ``buffer``.

        Args:
            name: one of :attr:`names`.
            buffer: see :meth:`flash_llm.io.checkpoint.Checkpoint.raw`.
        """
        if self.is_packed(name):
            return self.checkpoint.weight(name.removesuffix(".weight")).to_dense()
        if name in self.encoded:
            return self.encoded[name].read()
        return self.checkpoint.tensor(name, buffer)

    def in_file(self, file: Path) -> Iterator[str]:
        """Yield the names of the tensors whose first part is in a file."""
        first_parts = {encoded.parts[0]: name for name, encoded in self.encoded.items()}
        for key in self.checkpoint.names(file):
            if key not in self._encoded_parts:
                yield key
            elif key in first_parts:  # the other parts may be in other files
                yield first_parts[key]


def is_conv1d_model(folder: Path) -> bool | None:
    """Return whether a folder's model has Conv1D layers, whose dense weights are ``[K, M]``.

    Returns:
        None if there is no ``config.json``.

    Raises:
        ValueError: ``config.json`` is not a JSON object.
    """
    path = folder / "config.json"
    return read_json(path).get("model_type") in _CONV1D_MODELS if path.is_file() else None


def is_conv1d_name(layer: str) -> bool:
    """Return whether a layer of a model with Conv1D layers is one of them, by its name."""
    return layer.rpartition(".")[2] in _CONV1D_LAYERS
