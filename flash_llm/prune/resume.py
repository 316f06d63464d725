"""Resumable pruning: a folder that holds the finished layers, and identifies their run.

``run.json`` identifies the run: the recipe, and digests of the calibration samples and of every
tensor of the dense model. ``allocation.json`` holds each layer's target if targets were measured.
``layer-00007.safetensors`` holds the new weight of layer 7, and its row of the report as metadata.
Every file is written under a temporary name and then renamed, so that a kill at any moment loses
only the unfinished layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flash_llm.io.files import from_json, read_json, write_whole
from flash_llm.prune.blocks import Sample
from flash_llm.prune.report import PrunedLayer, PruneRecipe

RUN_NAME = "run.json"
ALLOCATION_NAME = "allocation.json"


class ResumeFolder:
    """The finished layers of one pruning run.

    Args:
        folder: created if it does not exist.
        model: the dense model of the run.
        layers: names of the layers to prune, in order.
        recipe: arguments of the run.
        samples: calibration samples.

    Raises:
        OSError: the folder cannot be created or written.
        ValueError: the folder is broken, or of another run (the message names the first
            difference).
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        layers: Iterable[str],
        recipe: PruneRecipe,
        samples: Sequence[Sample],
    ) -> None:
        self._folder = folder
        self._files = {
            name: folder / f"layer-{number:05d}.safetensors" for number, name in enumerate(layers)
        }
        run = {
            "recipe": asdict(recipe),
            "layers": list(self._files),
            "calibration": digest(_tensors(samples)),
            "model": {name: digest([tensor]) for name, tensor in model.state_dict().items()},
        }
        run = json.loads(json.dumps(run))  # tuples become lists, as they do in the file
        path = folder / RUN_NAME
        if path.exists():
            try:
                stored = read_json(path)
                if {k: type(v) for k, v in stored.items()} != {k: type(v) for k, v in run.items()}:
                    raise ValueError("it does not describe a run")
            except ValueError as error:
                raise ValueError(f"flash_llm.prune_: {path} cannot be read: {error}") from None
            _refuse_difference(folder, stored, run)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(run, indent=1).encode())

    def allocation(self, measure: Callable[[], dict[str, float | None]]) -> dict[str, float | None]:
        """Return each layer's target: the stored ones, or else measure and store them."""
        path = self._folder / ALLOCATION_NAME
        if path.exists():
            try:
                stored: dict[str, float | None] = from_json(
                    dict[str, float | None], read_json(path)
                )
            except ValueError as error:
                raise ValueError(f"flash_llm.prune_: {path} is no allocation: {error}") from None
            if stored.keys() != self._files.keys():
                raise ValueError(f"flash_llm.prune_: {path} is not of the layers of this run")
            return stored
        found = measure()
        write_whole(path, json.dumps(found).encode())
        return found

    def holds(self, name: str) -> bool:
        """Whether a layer is finished."""
        return self._files[name].exists()

    def restore(self, name: str, weight: Tensor) -> PrunedLayer:
        """Copy a finished layer into its weight, and return its row of the report.

        Raises:
            ValueError: the file is broken, or of another shape or dtype.
        """
        path = self._files[name]
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                stored = file.get_tensor("weight")
                entry: PrunedLayer = from_json(PrunedLayer, json.loads(file.metadata()["layer"]))
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"flash_llm.prune_: {path} is broken ({error}); remove it to prune {name} again"
            ) from None
        if stored.shape != weight.shape or stored.dtype != weight.dtype:
            raise ValueError(
                f"flash_llm.prune_: {path} must hold {weight.dtype} {list(weight.shape)}, got "
                f"{stored.dtype} {list(stored.shape)}"
            )
        weight.copy_(stored)
        return entry

    def keep(self, entry: PrunedLayer, weight: Tensor) -> None:
        """Write a finished layer to the folder.

        Raises:
            OSError: the file cannot be written.
        """
        tensors = {"weight": weight.contiguous()}
        metadata = {"layer": json.dumps(asdict(entry))}
        write_whole(self._files[entry.name], safetensors.torch.save(tensors, metadata))


def _tensors(samples: Iterable[Sample]) -> Iterator[Tensor]:
    """Yield the tensors in samples, and keys and other values of dicts as tensors of their text."""
    for sample in samples:
        if isinstance(sample, Tensor):
            yield sample
            continue
        for key, value in sample.items():
            yield torch.tensor(list(key.encode()))
            yield value if isinstance(value, Tensor) else torch.tensor(list(repr(value).encode()))


def digest(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of dtypes, shapes and, except on the meta device, values."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _refuse_difference(folder: Path, stored: dict[str, Any], run: dict[str, Any]) -> None:
    for name, value in run["recipe"].items():
        if name == "calibration":  # the samples are compared, not the name of their file
            continue
        before = stored["recipe"].get(name)
        if before != value:
            _refuse(folder, f"{name} was {before!r} and is {value!r} now")
    if stored.get("layers") != run["layers"]:
        _refuse(folder, f"its layers are not these {len(run['layers'])}")
    if stored.get("calibration") != run["calibration"]:
        _refuse(folder, "the calibration samples differ")
    for name, value in run["model"].items():
        if stored["model"].get(name) != value:
            _refuse(
                folder,
                f"{name} of the model has changed; a model that is partly pruned must be "
                "loaded again first",
            )


def _refuse(folder: Path, difference: str) -> None:
    raise ValueError(
        f"flash_llm.prune_: resume_dir {folder} belongs to another run: {difference}. Choose "
        "another folder, or remove this one to start over"
    )
