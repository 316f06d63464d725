"""Prune a saved model of transformers into another folder: what ``flash-llm prune`` does.

The new folder is built under a temporary name and renamed when it is whole. What pruning has
finished is kept there, so that a run that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flash_llm import hf, ops
from flash_llm.checkpoint import Checkpoint, checkpoint_files
from flash_llm.convert import copy_other_files, read_config, write_card
from flash_llm.evaluate import ProgressBar
from flash_llm.prune.calibrate import prune_
from flash_llm.prune.report import PruneReport
from flash_llm.sparsify import (
    DEFAULT_IGNORE,
    DEFAULT_TARGETS,
    refuse_tied,
    select_layers,
    sparsify_,
)
from flash_llm.unfinished import UnfinishedFolder, check_destination

_CALLER = "flash_llm.prune_checkpoint"
# In the unfinished folder, what prune_ keeps to go on.
_STATE = "state"


@dataclasses.dataclass(frozen=True)
class PrunePlan:
    """What would be pruned; prints as a table.

    Attributes:
        shapes: ``(M, K)`` of each layer, by name, in the model's order.
        dtype: of the weights.
        model_bytes: of all weights of the model.
    """

    shapes: dict[str, tuple[int, int]]
    dtype: str
    model_bytes: int

    @property
    def layer_bytes(self) -> int:
        """Bytes of the dense weights of all layers that would be pruned."""
        itemsize = int(getattr(torch, self.dtype).itemsize)
        return sum(m * k * itemsize for m, k in self.shapes.values())

    def to_json(self) -> str:
        """Return the fields, ``num_layers`` and ``layer_bytes`` as indented JSON."""
        more = {"num_layers": len(self.shapes), "layer_bytes": self.layer_bytes}
        return json.dumps({**dataclasses.asdict(self), **more}, indent=2)

    def __str__(self) -> str:
        width = max(map(len, self.shapes), default=0)
        lines = [f"{name:<{width}}  {m}x{k}" for name, (m, k) in self.shapes.items()]
        lines.append(
            f"{len(self.shapes)} layers would be pruned: {self.layer_bytes / 1e6:.3f} of "
            f"{self.model_bytes / 1e6:.3f} MB of weights, {self.dtype}"
        )
        return "\n".join(lines)


def plan_pruning(
    src: str | os.PathLike[str],
    *,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    dtype: torch.dtype | None = None,
) -> PrunePlan:
    """Say which layers :func:`prune_checkpoint` would prune; reads no weights.

    Args:
        src: as in :func:`prune_checkpoint`.
        targets: likewise.
        ignore: likewise.
        dtype: likewise.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: ``src`` holds no checkpoint.
        ValueError: ``src`` is packed, quantised, broken or of an architecture that transformers
            does not know; a pattern matches nothing; a layer is tied to another module.
    """
    src = Path(src)
    _check_source(src)
    model, dtype = _empty_model(src, dtype)
    layers = select_layers(model, targets, ignore)
    if not layers:
        raise ValueError(f"{_CALLER}: ignore={ignore!r} leaves nothing of targets={targets!r}")
    refuse_tied(model, list(layers.items()), _CALLER, "pruning one would prune the other")
    shapes = {}
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        m, k = weight.t().shape if type(layer).__name__ == "Conv1D" else weight.shape
        shapes[name] = (m, k)
    return PrunePlan(
        shapes,
        str(dtype).removeprefix("torch."),
        sum(parameter.numel() * dtype.itemsize for parameter in model.parameters()),
    )


def prune_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    calibration: str | os.PathLike[str] | None = None,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    pack: bool = True,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    progress: bool | ProgressBar = False,
    **options: Any,
) -> PruneReport:
    """Prune a model of transformers that is saved as safetensors, and save the result.

    ``dst`` gets the pruned model, packed or dense with zeros, the report and the recipe
    (:meth:`PruneReport.save`), and the other files of ``src``: tokenizer, model card.

    Args:
        src: folder of a dense model, and of its tokenizer where ``calibration`` is text.
        dst: folder to make; it must not be there. Until it is whole it is called ``dst.partial``,
            and calling again with the same arguments goes on with that.
        calibration: a ``.txt`` or ``.jsonl`` file; see :func:`flash_llm.prune_`.
        targets: patterns of the layers to prune, as in :func:`flash_llm.sparsify_`.
        ignore: patterns of the layers to leave alone; wins over ``targets``.
        pack: pack what that makes smaller; False saves dense weights with zeros.
        format: of the packed weights, as in :func:`flash_llm.sparsify_`.
        dtype: load the model in this dtype; None in that of its weights. Packed weights are float16
            or bfloat16.
        device: where the blocks are pruned, one at a time; the model stays on the CPU.
        resume: False removes a ``dst.partial`` of an earlier call and begins anew.
        progress: as in :func:`flash_llm.prune_`.
        options: ``method``, ``sparsity``, ``scope``, ``allocation``, ``nsamples``, ``seqlen``,
            ``seed`` and what else :func:`flash_llm.prune_` takes.

    Returns:
        What was pruned.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: ``src`` holds no checkpoint, or ``calibration`` is not there.
        FileExistsError: ``dst`` is there, or ``dst.partial`` is of other work or in work by
            another run.
        TypeError: ``pack`` and the weights are neither float16 nor bfloat16.
        ValueError: what :func:`plan_pruning` and :func:`flash_llm.prune_` refuse; there is no
            tokenizer for the calibration text.
        OSError: the disk is full or cannot be written; ``src`` is untouched, and what is finished
            stays in ``dst.partial``.
    """
    src, dst = Path(src), Path(dst)
    ops.check_format(format)
    plan = plan_pruning(src, targets=targets, ignore=ignore, dtype=dtype)
    if pack and getattr(torch, plan.dtype) not in ops.VALUE_DTYPES.values():
        raise TypeError(
            f"{_CALLER}: the weights of {src} are {plan.dtype}, packed ones are float16 or "
            "bfloat16; pass dtype, or pack=False"
        )
    if calibration is not None and not Path(calibration).is_file():
        raise FileNotFoundError(f"{_CALLER}: calibration {calibration} is no file")
    check_destination(dst, _CALLER)
    if calibration is not None:
        options |= {"calibration": Path(calibration), "tokenizer": _load_tokenizer(src)}
    note = {"dtype": plan.dtype}
    with UnfinishedFolder(dst, src, note, _CALLER, resume=resume) as unfinished:
        state = unfinished.path / _STATE
        state.mkdir(exist_ok=True)
        try:
            model = hf.from_pretrained(src, dtype=dtype or "auto")
            report = prune_(
                model,
                targets=targets,
                ignore=ignore,
                device=device,
                resume_dir=state,
                progress=progress,
                **options,
            )
        except BaseException:
            if not any(state.glob("*.safetensors")):  # no layer is done: nothing to go on with
                unfinished.discard()
            raise
        if pack:
            sparsify_(model, targets, ignore, format=format)
        shutil.rmtree(unfinished.content)  # half of a model, from a run that was killed
        unfinished.content.mkdir()
        copy_other_files(src, unfinished.content, checkpoint_files(src))
        model.save_pretrained(unfinished.content)
        if Checkpoint(checkpoint_files(unfinished.content)).packed:
            write_card(src, unfinished.content)
        report.save(unfinished.content)
        unfinished.finish()
    return report


def parse_allocation(text: str) -> str | Mapping[str, float]:
    """Return an allocation of :func:`flash_llm.prune_`: a name, or what a ``.json`` file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no object from patterns to numbers.
    """
    if not text.endswith(".json"):
        return text
    try:
        found = json.loads(Path(text).read_text())
    except ValueError as error:
        raise ValueError(f"allocation {text} is no JSON: {error}") from None
    if not isinstance(found, dict) or not all(type(v) in (int, float) for v in found.values()):
        raise ValueError(f"allocation {text} must hold an object from patterns to sparsities")
    return found


def _check_source(src: Path) -> None:
    checkpoint = Checkpoint(checkpoint_files(src))
    if checkpoint.packed:
        name = next(iter(checkpoint.packed))
        raise ValueError(f"{_CALLER}: {name} in {src} is packed; prune before packing")
    if read_config(src, _CALLER) is None:
        raise FileNotFoundError(f"{_CALLER}: {src} has no config.json, which names the model")


def _empty_model(src: Path, dtype: torch.dtype | None) -> tuple[nn.Module, torch.dtype]:
    """The model on the meta device, and the dtype that it is loaded in."""
    cls, config = hf.model_class(src)
    with torch.device("meta"):
        model: nn.Module = cls(config)
    model.tie_weights()  # type: ignore[operator]
    return model, dtype or config.dtype or torch.float32


def _load_tokenizer(src: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(src)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{_CALLER}: calibration text needs the model's tokenizer, and {src} has none that "
            f"transformers can load: {error}"
        ) from error
