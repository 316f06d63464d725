"""A checkpoint as if it were dense, whatever its weights are stored as."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from flash_llm.io import encoded
from flash_llm.io.checkpoint import PACKED_PARTS, SPELLINGS, Checkpoint
from flash_llm.io.files import read_json

# Models whose layers are Conv1D, which keeps its weight as [K, M], and the names of those layers.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")


class DenseView:
    """A checkpoint as if it were dense: what is packed is unpacked when it is asked for.

    Args:
        files: all files of the checkpoint.

    Attributes:
        checkpoint: what the files hold.
        encoded: what other tools store in several parts, by the name of the dense tensor.
        shapes: of all dense and encoded weights, by layer.
        names: of all tensors, a packed weight's being ``….weight``.
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
        """Whether a tensor, one of :attr:`names`, is stored packed."""
        return name.endswith(".weight") and name.removesuffix(".weight") in self.checkpoint.packed

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, one of :attr:`names`, when it is dense."""
        if self.is_packed(name):
            header = self.checkpoint.packed[name.removesuffix(".weight")]
            return header.m, header.k
        return self.encoded[name].shape if name in self.encoded else self.checkpoint.shape(name)

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, one of :attr:`names`, as safetensors spells it."""
        if self.is_packed(name):
            return SPELLINGS[self.checkpoint.packed[name.removesuffix(".weight")].dtype]
        return self.checkpoint.dtype(self.encoded[name].parts[0] if name in self.encoded else name)

    def tensor(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Load a tensor, dense, to the CPU; one that is stored so to ``buffer``, if there is one.

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
        """Names of the tensors that begin in a file."""
        begins = {encoded.parts[0]: name for name, encoded in self.encoded.items()}
        for key in self.checkpoint.names(file):
            if key not in self._encoded_parts:
                yield key
            elif key in begins:  # the other parts may be in other files
                yield begins[key]


def is_conv1d_model(folder: Path) -> bool | None:
    """Whether a folder's model has Conv1D layers, whose weights are ``[K, M]`` in dense files.

    Returns:
        None if there is no ``config.json`` to say so.

    Raises:
        ValueError: ``config.json`` is no JSON object.
    """
    path = folder / "config.json"
    return read_json(path).get("model_type") in _CONV1D_MODELS if path.is_file() else None


def is_conv1d_name(layer: str) -> bool:
    """Whether a layer of a model with Conv1D layers is one of them."""
    return layer.rpartition(".")[2] in _CONV1D_LAYERS
