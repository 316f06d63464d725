"""``FlashLLMConfig``: what vLLM asks about a model with quantization method ``flash_llm``.

A folder that flash_llm wrote says itself which layers are packed, so its headers are read before
vLLM starts its workers. All other folders are dense: their layers are packed while they load.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from flash_llm import _extension, ops
from flash_llm.integrations import hf_quantizer
from flash_llm.integrations.vllm.linear_method import FlashLLMLinearMethod
from flash_llm.io.checkpoint import PACKED_PARTS, Checkpoint, checkpoint_files
from flash_llm.sparsify import LayerReport, SparsifyReport

logger = init_logger("vllm.flash_llm")

METHOD = hf_quantizer.METHOD

_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What layers of these names are fused of in models that do not say it themselves."""

_DRAFT = "draft_model."
"""What vLLM puts before the names of the layers of a draft model (speculative decoding)."""


def register() -> None:
    """Tell vLLM about the quantization method, unless that has been done."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(FlashLLMConfig)


class FlashLLMConfig(QuantizationConfig):
    """Which linear layers of a model are packed, and from what.

    Three kinds of models, told apart by their arguments and files:

    - a folder that flash_llm wrote: its packed layers are loaded, its dense ones stay dense;
    - a dense folder (``quantization="flash_llm"``): each layer is packed if that makes it smaller;
    - ``{"quant_method": "flash_llm", "sparsity": 0.8}`` as the ``quantization_config`` of a dense
      model (``hf_overrides``): each layer is pruned by magnitude first. With
      ``load_format="dummy"`` this measures the speed of a model without its weights.

    An ``"expected_tokens"`` in that config says how many tokens most steps will have at most
    (requests that decode together): the layers are packed for so few, see :func:`flash_llm.pack`.
    ``"values": "int8"`` (or ``"fp8_e4m3"``, ``"int4"``) rounds the weights of a dense model; packed
    layers of a folder keep their values and scales, unless vLLM fuses a layer of several kinds of
    values, which gets 16-bit ones. ``"x_quantization": "dynamic"`` lets layers with quantised
    values round their inputs too, see :func:`flash_llm.spmm`.

    Embeddings, output layers and the experts of mixtures stay dense.

    Args:
        sparsity: fraction of zeros in [0, 1] to prune each row to; None packs the zeros there are.
        values: what to store of dense weights, one of :data:`flash_llm.ops.STORED_VALUES`; None for
            16-bit.
        expected_tokens: None if it is unknown.
        x_quantization: None, or ``"dynamic"``.
        packed_folder: whether the model's config says that its folder holds packed layers.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1], ``values`` or ``x_quantization`` is unknown, or
            ``expected_tokens`` is not positive.
        TypeError: ``sparsity`` is no number, or ``expected_tokens`` no integer.
        RuntimeError: the compiled extension is missing.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        values: str | None = None,
        expected_tokens: int | None = None,
        x_quantization: str | None = None,
        packed_folder: bool = False,
    ) -> None:
        super().__init__()
        _extension.require()
        ops.check_expected_tokens(expected_tokens)
        ops.check_x_quantization(x_quantization)
        if sparsity is not None:
            if not isinstance(sparsity, (int, float)) or isinstance(sparsity, bool):
                raise TypeError(
                    f"flash_llm: sparsity must be a number, got {type(sparsity).__name__}"
                )
            if not 0 <= sparsity <= 1:
                raise ValueError(f"flash_llm: sparsity must lie in [0, 1], got {sparsity}")
        if values is not None:
            ops.check_values(values)
        self.sparsity = sparsity
        self.values = values
        self.expected_tokens = expected_tokens
        self.x_quantization = x_quantization
        self.packed_folder = packed_folder
        self.checkpoint: Checkpoint | None = None
        self.stored: dict[str, str] = {}
        """vLLM's names of the layers that the checkpoint holds packed, and the checkpoint's."""
        self._pending = 0
        self._rows: list[LayerReport] = []

    @classmethod
    def get_name(cls) -> str:
        """Name of the quantization method."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Dtypes that a model may run in."""
        return list(dict.fromkeys(ops.VALUE_DTYPES.values()))

    @classmethod
    def get_min_capability(cls) -> int:
        """10 * major + minor of the oldest GPU that has kernels."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file of its own: everything is in the model's config and its safetensors files."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FlashLLMConfig:
        """Read the ``quantization_config`` of a model.

        Args:
            config: ``quant_method``, and ``version`` (of packed folders), ``sparsity``, ``values``,
                ``expected_tokens`` or ``x_quantization``.

        Raises:
            NotImplementedError: a newer flash_llm wrote the folder.
            ValueError: there is another key, or as the constructor.
            TypeError: as the constructor.
        """
        hf_quantizer.FlashLLMConfig(**config)  # refuses versions that cannot be read
        options = ("sparsity", "values", "expected_tokens", "x_quantization")
        unknown = sorted(config.keys() - {"quant_method", "version", *options})
        if unknown:
            raise ValueError(
                f'flash_llm: quantization_config must hold "quant_method" and "version", '
                f'"sparsity", "values", "expected_tokens" or "x_quantization", got "{unknown[0]}"'
            )
        given = {option: config[option] for option in options if config.get(option) is not None}
        packed_folder = "sparsity" not in given and (not given or "version" in config)
        return cls(**given, packed_folder=packed_folder)

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: PretrainedConfig | None = None,
        revision: str | None = None,
    ) -> None:
        """Read the headers of the model's files, in the process that starts the others.

        Args:
            model_name: a folder, or a name on the hub, of which packed folders are downloaded here.
            hf_config: of the model; says which commit of the hub is meant.
            revision: likewise; vLLM does not pass it.

        Raises:
            FileNotFoundError: the config names flash_llm, and there are no safetensors files.
            ValueError: a file is malformed; the config names flash_llm, and nothing is packed; or
                layers are packed, and a ``sparsity`` or ``values`` are given.
            TypeError: a tensor of a packed layer has the wrong dtype.
            NotImplementedError: a newer flash_llm wrote the files.
        """
        folder = model_name
        if not os.path.isdir(folder):
            if not self.packed_folder:
                return
            from huggingface_hub import constants, snapshot_download

            folder = snapshot_download(
                model_name,
                revision=revision or getattr(hf_config, "_commit_hash", None),
                allow_patterns=["*.safetensors", "*.json"],
                local_files_only=constants.HF_HUB_OFFLINE,  # else it asks for a commit's files
            )
        try:
            files = checkpoint_files(folder)
        except FileNotFoundError:
            if self.packed_folder:
                raise
            return  # files of another kind, or none: load_format="dummy" needs no weights
        self.checkpoint = Checkpoint(files)
        self.stored = {name: name for name in self.checkpoint.packed}
        if self.packed_folder and not self.stored:
            raise ValueError(
                f'flash_llm: the config of {folder} names "{METHOD}", but no layer is packed '
                "there; to prune a dense model by magnitude while it loads, give a sparsity"
            )
        for option, given in (("sparsity", self.sparsity), ("values", self.values)):
            if self.stored and given is not None:
                first = next(iter(self.stored))
                raise ValueError(
                    f"flash_llm: {option} {given} is given, but {first} is packed already in "
                    f"{self.file_of(first)}"
                )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the packed layers as vLLM's model does."""
        self.stored = hf_to_vllm_mapper.apply_dict(self.stored)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a linear layer; None leaves other layers dense.

        Args:
            layer: of vLLM, while it is built.
            prefix: its name in vLLM's model.

        Raises:
            NotImplementedError: an embedding or an output layer is packed in the folder, or vLLM is
                told to keep weights on the CPU.
            ValueError: the weights are random, and no sparsity is given.
        """
        name = prefix.removeprefix(_DRAFT)
        if not isinstance(layer, LinearBase):
            if name in self.stored:
                raise NotImplementedError(
                    f"flash_llm: {name} is packed in {self.file_of(name)}, but vLLM's "
                    f"{type(layer).__name__} can only be dense; leave it out when packing"
                )
            if {"RoutedExperts", "FusedMoE"} & {cls.__name__ for cls in type(layer).__mro__}:
                logger.info_once("flash_llm: experts stay dense: no kernel multiplies by several")
            return None
        engine = get_current_vllm_config()
        offload = engine.offload_config
        if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
            raise NotImplementedError(
                "flash_llm: vLLM cannot keep packed weights on the CPU; leave out cpu_offload_gb "
                "and offload_group_size"
            )
        dummy = engine.load_config.load_format == "dummy"
        if dummy and self.sparsity is None:
            raise ValueError(
                'flash_llm: load_format="dummy" makes weights without zeros; give a sparsity: '
                f'hf_overrides={{"quantization_config": {{"quant_method": "{METHOD}", '
                '"sparsity": 0.8}}'
            )
        self._pending += 1
        return FlashLLMLinearMethod(self, prefix, self._shards(name), dummy)

    def _shards(self, name: str) -> list[str]:
        """The checkpoint's names of the layers that a layer of vLLM is fused of."""
        parent, dot, last = name.rpartition(".")
        fused = [] if name in self.stored else (_FUSED | self.packed_modules_mapping).get(last, [])
        shards = [parent + dot + shard for shard in fused] or [name]
        return [self.stored.get(shard, shard) for shard in shards]

    def file_of(self, name: str) -> str:
        """File that holds a packed layer, by vLLM's name or the checkpoint's."""
        assert self.checkpoint is not None
        return str(self.checkpoint.file_of(self.stored.get(name, name) + PACKED_PARTS[0]))

    def note(self, row: LayerReport) -> None:
        """Take down what became of a layer; after the last one the log says it of all."""
        self._rows.append(row)
        self._pending -= 1
        if not self._pending:
            logger.info("flash_llm:\n%s", SparsifyReport(tuple(self._rows)).summary())
            self._rows.clear()
