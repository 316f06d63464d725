"""A demonstration on real weights: measures and compares a model as dense, pruned and packed.

Model and text are those of :mod:`flash_llm.smollm2`, so nothing is downloaded when this runs.
``flash-llm demo`` calls :func:`main`; ``examples/quickstart.py`` takes the same steps through the
public API and uses :class:`Comparison` to measure and show.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flash_llm import _extension
from flash_llm.evaluate import perplexity
from flash_llm.forward import evaluation_mode
from flash_llm.linear import SparseLinear
from flash_llm.progress import LogLines, ProgressBar
from flash_llm.prune.calibrate import make_recipe, prune_
from flash_llm.prune.criteria import check_prune_target
from flash_llm.report_base import as_json
from flash_llm.smollm2 import (
    CALIBRATION_SAMPLES,
    WINDOW,
    import_extra,
    load_smollm2,
    pydoc_text,
    pydoc_tokens,
)
from flash_llm.sparsify import SparsifyReport, model_bytes, sparsify_
from flash_llm.table import grouped, shape_text
from flash_llm.weight_only import GROUP, WEIGHT_ONLY_VALUES, quantize_, round_

__all__ = [
    "CALIBRATION_SAMPLES",
    "Comparison",
    "Control",
    "Measurement",
    "decode_logits",
    "decoding_speeds",
    "greedy_decode",
    "load_smollm2",
    "main",
    "pick_device",
    "pydoc_text",
    "pydoc_tokens",
]

METHOD = "sparsegpt"
"""Default pruning method: a minute or two on two cores. ADMM loses less, in three times as long."""
SPARSITY = 0.35
"""Default fraction of zeros: the model still answers, at 1.10 times the dense perplexity."""
MOST_LOSS = 1.12
"""Upper limit for the perplexity with the defaults, relative to the dense model."""
COSTS = {0.5: 1.19, 0.6: 1.49}
"""Perplexity relative to the dense model by fraction of zeros, from
``benchmarks/results/accuracy.jsonl``: ADMM, uniform allocation, 32 calibration samples, no
recovery."""
WINDOWS = 4
"""Default number of held-out windows for the perplexity."""
DEQUANTISED = (
    "Its weights were dequantised from a Q4_1 file of 4 bits per weight: the dense model has "
    "already lost some quality, and the loss by pruning comes on top."
)
"""A note on the dense model of :mod:`flash_llm.smollm2`."""
QUESTION = "What is the capital of France?"
ANSWER_TOKENS = 48
TIMING_TOKENS = 32
"""Largest number of tokens that each model generates in a timed turn."""
TIMING_TURNS = 2
"""Timed turns of each model, after one that is not counted."""
FLOAT32 = "dense, float32"
"""Name of the dense model in float32, of which only the speed is measured."""
UNPRUNED = "packed, not pruned"
"""Name of the control: the dense model's weights, packed without pruning."""
ROUNDED = {values: f"torch {values}" for values in WEIGHT_ONLY_VALUES}
"""Names of the dense model with torch's weight-only products."""
LOGIT_TOKENS = 32
PERPLEXITY_AGREEMENT = 0.01
"""Largest relative difference in perplexity that rounding can explain."""
LOGIT_AGREEMENT = 0.1
"""Likewise for logits, as a fraction of the largest. On the same pruned model, bfloat16 against
float32 is 0.035 (1.19 of 34.5, sparsity 0.6), packed against dense in bfloat16 0.024 (CPU)."""


def pick_device(wanted: str = "auto") -> tuple[torch.device, str]:
    """Choose where to run.

    Args:
        wanted: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Returns:
        The device and the reason, as a sentence.

    Raises:
        ValueError: ``wanted`` names no CPU or CUDA device, or a GPU that is not there.
    """
    num_gpus = torch.cuda.device_count()
    if wanted != "auto":
        try:
            device = torch.device(wanted)
        except RuntimeError:
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {wanted!r}") from None
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {wanted!r}")
        if device.type == "cuda" and (device.index or 0) >= num_gpus:
            raise ValueError(f"device {wanted!r} is not there: torch sees {num_gpus} GPUs")
        return device, "It was asked for."
    if num_gpus == 0:
        return torch.device("cpu"), "torch sees no GPU."
    if not _extension.require().build_info()["cuda"]:
        return torch.device("cpu"), "There is a GPU, but flash_llm was built without CUDA."
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < (8, 0):
        return torch.device("cpu"), f"The GPU ({name}) is older than compute capability 8.0."
    return torch.device("cuda"), f"The GPU is an {name}."


def decode_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits of a text that is processed one token at a time, as in generation.

    Args:
        model: a transformers causal language model.
        ids: ``[T]`` token ids.

    Returns:
        ``[T, vocabulary]`` float32 on the CPU.
    """
    rows, cache = [], None
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for token in ids.to(device):
            output = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0, -1].float().cpu())
    return torch.stack(rows)


def greedy_decode(model: nn.Module, prompt: Tensor, num_tokens: int) -> tuple[Tensor, list[float]]:
    """Generate ``num_tokens`` tokens at batch 1 with a key/value cache; ignores end-of-text.

    Args:
        model: a transformers causal language model.
        prompt: ``[1, L]`` token ids on the model's device.
        num_tokens: tokens to generate; the first one results from the pass of the prompt.

    Returns:
        ``[num_tokens]`` ids, and the seconds for each token after the first.
    """
    tokens, seconds = [], []
    ids, cache = prompt, None
    with evaluation_mode(model):
        for _ in range(num_tokens):
            start = time.perf_counter()
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids = output.logits[:, -1:].argmax(dim=-1)
            tokens.append(ids.item())  # waits for the device
            seconds.append(time.perf_counter() - start)
    return torch.tensor(tokens), seconds[1:]


def decoding_speeds(
    models: Mapping[str, nn.Module], prompt: Tensor, num_tokens: int, turns: int = TIMING_TURNS
) -> dict[str, float]:
    """Time greedy decoding at batch 1; the models take turns, so that all see the same conditions.

    Args:
        models: transformers causal language models by name.
        prompt: ``[1, L]`` token ids, on any device.
        num_tokens: tokens that each model generates in a turn, at least 2.
        turns: timed turns, after one that is not counted.

    Returns:
        Tokens per second by name: the median over all tokens except the first of each turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(1 + turns):
        for name, model in models.items():
            there = prompt.to(next(model.parameters()).device)
            _, times = greedy_decode(model, there, num_tokens)
            if turn > 0:  # the first turn allocates memory and chooses kernels
                seconds[name] += times
    return {name: 1.0 / statistics.median(times) for name, times in seconds.items()}


@dataclass(frozen=True)
class Measurement:
    """One stage of the model.

    Attributes:
        perplexity: on the held-out text.
        weight_bytes: bytes of parameters and buffers.
        answer: greedy answer to the question, up to the end of text; None for the pruned model,
            whose answer is that of the packed model.
        logits: ``[LOGIT_TOKENS, vocabulary]`` float32 for the first held-out tokens, processed one
            at a time, by the packed layers if there are any.
    """

    perplexity: float
    weight_bytes: int
    answer: str | None
    logits: Tensor


@dataclass(frozen=True)
class Control:
    """The unpruned model with a faster matrix product.

    Attributes:
        perplexity: on the held-out text.
        weight_bytes: bytes of parameters and buffers.
    """

    perplexity: float
    weight_bytes: int


class Comparison:
    """Measures a model as ``dense``, ``pruned`` and ``packed``, and shows the differences.

    Perplexities are computed in float32: a CPU without bfloat16 instructions takes five times as
    long in bfloat16. Answers, logits and speeds are measured in the dtype of the model.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        heldout: ``[T]`` token ids that were not used for calibration.
        question: for the dense and the packed model, in the chat template.
        windows: number of held-out windows for the perplexity.
        window: tokens per window.
        answer_tokens: largest number of tokens of an answer.

    Raises:
        ImportError: rich (extra ``demo``) is not installed.
    """

    def __init__(
        self,
        tokenizer: Any,
        heldout: Tensor,
        *,
        question: str = QUESTION,
        windows: int = WINDOWS,
        window: int = WINDOW,
        answer_tokens: int = ANSWER_TOKENS,
    ) -> None:
        self.console = import_extra("rich.console").Console()
        self.stages: dict[str, Measurement] = {}
        self.controls: dict[str, Control] = {}
        self.tokens_per_second: dict[str, float] = {}  # by stage, control and FLOAT32
        self._tokenizer = tokenizer
        self._heldout = heldout
        self._question = question
        self._windows = windows
        self._window = window
        self._answer_tokens = answer_tokens

    @property
    def progress(self) -> ProgressBar:
        """Progress of long calls: a bar of rich on a terminal, lines in a log elsewhere."""
        if not self.console.is_terminal:
            return LogLines
        bar: Callable[[Sequence[Any], str], Any] = functools.partial(
            import_extra("rich.progress").track, console=self.console
        )
        return bar

    def step(self, text: str) -> None:
        """Print the heading of a step."""
        self.console.rule(text, align="left")

    def measure(self, stage: str, model: nn.Module) -> Measurement:
        """Measure the model in its current state.

        Args:
            stage: ``"dense"``, ``"pruned"`` or ``"packed"``.
            model: a transformers causal language model.

        Returns:
            The measurement; :meth:`show` uses it as well.
        """
        self.stages[stage] = Measurement(
            perplexity=self._perplexity(in_float32(model)),
            weight_bytes=model_bytes(model),
            answer=None if stage == "pruned" else self._ask(model),
            logits=decode_logits(model, self._heldout[:LOGIT_TOKENS]),
        )
        return self.stages[stage]

    def measure_controls(self, dense: nn.Module, report: SparsifyReport) -> dict[str, nn.Module]:
        """Measure what speeds up the dense model without pruning, on a CPU; nothing on a GPU.

        The controls are the dense weights, packed, and torch's weight-only INT8 and INT4.

        Args:
            dense: a transformers causal language model that was not pruned.
            report: of packing the pruned model; the controls change the same layers.

        Returns:
            The models by name, for :meth:`time_decoding`.
        """
        if next(dense.parameters()).device.type != "cpu":
            return {}
        layers = [row.name for row in report.rows if row.decision != "skipped"]
        models = {UNPRUNED: copy.deepcopy(dense)}
        sparsify_(models[UNPRUNED], pack_unprofitable=True, progress=self.progress)
        quality = self._perplexity(in_float32(models[UNPRUNED]))
        self.controls[UNPRUNED] = Control(quality, model_bytes(models[UNPRUNED]))
        for values, name in ROUNDED.items():
            models[name] = copy.deepcopy(dense)
            quantize_(models[name], layers, values)
            weights = in_float32(dense)
            round_(weights, layers, values)
            self.controls[name] = Control(self._perplexity(weights), model_bytes(models[name]))
        return models

    def _perplexity(self, model: nn.Module) -> float:
        return perplexity(
            model,
            self._heldout,
            window=self._window,
            max_windows=self._windows,
            progress=self.progress,
        )

    def time_decoding(self, **models: nn.Module) -> None:
        """Time greedy decoding as :func:`decoding_speeds` does.

        On a CPU the dense model is also timed in float32, in which many CPUs multiply faster.

        Args:
            models: by stage or control. A pruned model may stand for the dense one: zeros in a
                dense tensor do not change the speed.
        """
        dense = models.get("dense")
        if dense is not None and next(dense.parameters()).device.type == "cpu":
            models[FLOAT32] = copy.deepcopy(dense).float()
        num_tokens = min(self._answer_tokens, TIMING_TOKENS)
        self.tokens_per_second |= decoding_speeds(models, self._prompt(), num_tokens)

    def _prompt(self) -> Tensor:
        ids: Tensor = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": self._question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        return ids

    def _ask(self, model: Any) -> str:
        """Return the greedy answer to the question."""
        prompt = self._prompt().to(next(model.parameters()).device)
        tokens, _ = greedy_decode(model, prompt, self._answer_tokens)
        ends = torch.tensor(model.generation_config.eos_token_id)  # one id or several
        end = torch.isin(tokens, ends).nonzero()
        answer = tokens[: int(end[0])] if len(end) else tokens
        text: str = self._tokenizer.decode(answer, clean_up_tokenization_spaces=False)
        return text.strip()

    def logit_difference(self) -> float:
        """Largest absolute difference of a logit between the pruned and the packed model."""
        pruned, packed = self.stages["pruned"].logits, self.stages["packed"].logits
        return (pruned - packed).abs().max().item()

    def agrees(self) -> bool:
        """Whether rounding explains the differences between the pruned and the packed model."""
        pruned, packed = self.stages["pruned"].perplexity, self.stages["packed"].perplexity
        # Comparisons that are False for NaN.
        return (
            abs(packed / pruned - 1.0) <= PERPLEXITY_AGREEMENT
            and self.logit_difference() <= LOGIT_AGREEMENT * self._largest_logit()
        )

    def _largest_logit(self) -> float:
        return self.stages["pruned"].logits.abs().max().item()

    def show(self, report: SparsifyReport) -> None:
        """Print the tables, the answers and their interpretation.

        Args:
            report: of ``sparsify_``. All three stages must have been measured, and decoding of the
                dense and the packed model timed.
        """
        self.step("Layers")
        self._show_layers(report)
        self.step("The same model in three stages")
        self._show_stages()
        self.step(self._question)
        for stage in ("dense", "packed"):
            self.console.print(f"[bold]{stage}:[/bold]", end=" ")
            self.console.print(self.stages[stage].answer or "-", markup=False, highlight=False)
        self.step("What this means")
        for sentence in self.findings(report):
            self.console.print(f"- {sentence}", markup=False, highlight=False)

    def _show_layers(self, report: SparsifyReport) -> None:
        table = import_extra("rich.table").Table()
        table.add_column("layers")
        table.add_column("shape")
        for title in ("sparsity", "dense MB", "packed MB"):
            table.add_column(title, justify="right")
        table.add_column("decision")
        groups = grouped(report.rows, lambda row: (row.name.rpartition(".")[2], row.decision))
        for (group, decision), rows in groups.items():
            shapes = {row.shape for row in rows}
            packed = [row.packed_bytes for row in rows if row.packed_bytes is not None]
            zeros = [row.sparsity for row in rows if row.sparsity is not None]
            table.add_row(
                f"{len(rows)} x {group}",
                shape_text(shapes.pop()) if len(shapes) == 1 else "various",
                f"{statistics.mean(zeros):.3f}" if zeros else "-",
                f"{sum(row.dense_bytes for row in rows) / 1e6:.2f}",
                f"{sum(packed) / 1e6:.2f}" if packed else "-",
                decision if decision == "packed" else f"{decision}: {rows[0].reason}",
            )
        self.console.print(table)

    def _show_stages(self) -> None:
        table = import_extra("rich.table").Table()
        table.add_column("model")
        for title in ("perplexity", "memory MB", "tokens/s"):
            table.add_column(title, justify="right")
        measured: dict[str, Measurement | Control] = {**self.stages, **self.controls}
        for name, found in measured.items():
            table.add_row(
                name,
                f"{found.perplexity:.3f}",
                f"{found.weight_bytes / 1e6:.1f}",
                f"{self.tokens_per_second[name]:.1f}" if name in self.tokens_per_second else "-",
            )
        if FLOAT32 in self.tokens_per_second:
            table.add_row(FLOAT32, "-", "-", f"{self.tokens_per_second[FLOAT32]:.1f}")
        self.console.print(table)

    def findings(self, report: SparsifyReport) -> list[str]:
        """Return the interpretation of the numbers, as sentences."""
        dense, pruned, packed = (self.stages[name] for name in ("dense", "pruned", "packed"))
        zeros = [row.sparsity for row in report.packed if row.sparsity is not None]
        loss = pruned.perplexity / dense.perplexity
        quality = (
            f"Pruning took held-out perplexity from {dense.perplexity:.2f} to "
            f"{pruned.perplexity:.2f} ({loss:.2f} times)"
            + (f" at a sparsity of {statistics.mean(zeros):.2f}. " if zeros else ". ")
        )
        if loss > 1.5:
            quality += "That is a heavy loss: compare the answers above before using such a model."
        elif loss > MOST_LOSS:
            quality += f"That is a visible loss, above the {MOST_LOSS:.2f} of the defaults."
        elif loss > 1.05:
            quality += f"That is a visible loss, within the {MOST_LOSS:.2f} of the defaults."
        else:
            quality += "That is a small loss."
        costs = " and ".join(f"{cost:.2f} times at {more:.0%}" for more, cost in COSTS.items())
        quality += (
            f" More zeros cost more: {costs}, by ADMM on 32 calibration samples "
            "(benchmarks/results/accuracy.jsonl)."
        )
        if self.agrees():
            agreement = "Packing changed nothing but the order of rounding"
        else:
            agreement = "PACKING CHANGED THE RESULT, which is a bug"
        size = packed.weight_bytes / dense.weight_bytes
        dense_rate, packed_rate = (self.tokens_per_second[name] for name in ("dense", "packed"))
        speed = packed_rate / dense_rate
        pace = "faster" if speed > 1.02 else "slower" if speed < 0.98 else "no faster, no slower"
        return [
            quality,
            f"{agreement}: perplexity {pruned.perplexity:.3f} pruned, {packed.perplexity:.3f} "
            f"packed. Over {len(pruned.logits)} tokens, one at a time, their logits differ by at "
            f"most {self.logit_difference():.2f}; the largest is {self._largest_logit():.1f}.",
            f"The whole model takes {packed.weight_bytes / 1e6:.1f} MB instead of "
            f"{dense.weight_bytes / 1e6:.1f} MB ({size:.2f} times).",
            f"Decoding one sequence here, the packed model was {pace} than the dense one: "
            f"{packed_rate:.1f} against {dense_rate:.1f} tokens per second ({speed:.2f} times)"
            + self._against_float32(),
            *self._control_findings(),
        ]

    def _control_findings(self) -> list[str]:
        """Return where the gain comes from, and whether rounding the weights is better."""
        if not self.controls:
            return []
        rates = {
            name: self.tokens_per_second[name] / self.tokens_per_second["dense"]
            for name in ("packed", *self.controls)
        }
        quality = {name: control.perplexity for name, control in self.controls.items()}
        rounded = " and ".join(
            f"{values.upper()} {rates[name]:.2f} times at a perplexity of {quality[name]:.2f}"
            for values, name in ROUNDED.items()
        )
        better = [
            values.upper()
            for values, name in ROUNDED.items()
            if rates[name] > rates["packed"] and quality[name] <= self.stages["packed"].perplexity
        ]
        verdict = (
            f"For this small model {' and '.join(better)} would be the better choice here."
            if better
            else "Neither is both faster and better than the packed model here."
        )
        return [
            "Packed without pruning, which loses nothing, the model is "
            f"{rates[UNPRUNED]:.2f} times as fast as the dense one: this part of the gain is due "
            "to the matrix-vector product and not to zeros, which gain more on larger layers. "
            "(sparsify_(model, pack_unprofitable=True) packs without pruning.)",
            f"torch's own weight-only products, rounded to nearest (INT4 in groups of {GROUP}), "
            f"against the dense model: {rounded}. {verdict}",
        ]

    def _against_float32(self) -> str:
        if FLOAT32 not in self.tokens_per_second:
            return "."
        rate = self.tokens_per_second[FLOAT32]
        speed = self.tokens_per_second["packed"] / rate
        return f"; in float32 the dense one makes {rate:.1f} ({speed:.2f} times)."

    def to_json(self, report: SparsifyReport, **facts: Any) -> str:
        """Return all numbers, and ``facts``, as a JSON object."""
        stages = {
            name: {
                "perplexity": stage.perplexity,
                "weight_bytes": stage.weight_bytes,
                "tokens_per_second": self.tokens_per_second.get(name),
                "answer": stage.answer,
            }
            for name, stage in self.stages.items()
        }
        return json.dumps(
            {
                **facts,
                "question": self._question,
                "stages": stages,
                "controls": {
                    name: {**vars(found), "tokens_per_second": self.tokens_per_second.get(name)}
                    for name, found in self.controls.items()
                },
                "dense_float32_tokens_per_second": self.tokens_per_second.get(FLOAT32),
                "max_logit_difference": self.logit_difference(),
                "agrees": self.agrees(),
                "sparsify": as_json(report),
            },
            indent=2,
        )


def in_float32(model: nn.Module) -> nn.Module:
    """Return a copy of the model in float32, with its packed layers unpacked."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, SparseLinear):
            twin.set_submodule(name, layer.to_linear())
    return twin.float()


def main(
    *,
    method: str = METHOD,
    sparsity: float = SPARSITY,
    windows: int = WINDOWS,
    calibration_samples: int = CALIBRATION_SAMPLES,
    device: str = "auto",
    question: str = QUESTION,
    json_path: Path | None = None,
) -> bool:
    """Load SmolLM2-135M-Instruct, prune it, pack it, and show what this costs and saves.

    Args:
        method: of :func:`flash_llm.prune_`.
        sparsity: fraction of zeros in [0, 1] in every row.
        windows: held-out windows of 512 tokens for each perplexity.
        calibration_samples: samples of 512 tokens to prune with.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        question: for the dense and the packed model.
        json_path: file to write all numbers to; None for none.

    Returns:
        Whether the packed model agrees with the pruned one up to rounding.

    Raises:
        ValueError: an argument is out of range.
        ImportError: the weights or the ``demo`` extra are not installed.
        RuntimeError: the compiled extension is missing.
    """
    make_recipe(method=method)
    check_prune_target(sparsity, "row")
    if windows < 1:
        raise ValueError(f"windows must be at least 1, got {windows}")
    start = time.perf_counter()
    place, reason = pick_device(device)
    model, tokenizer = load_smollm2(place)
    calibration, heldout = pydoc_tokens(tokenizer, calibration_samples)
    run = Comparison(tokenizer, heldout, question=question, windows=windows)
    run.console.print(f"SmolLM2-135M-Instruct in bfloat16 on {place}. {reason}")
    run.console.print(DEQUANTISED)

    run.step("Dense")
    run.measure("dense", model)
    dense = copy.deepcopy(model)
    run.step(f"Prune to a sparsity of {sparsity} by {method}")
    pruning = prune_(
        model.float(),
        method=method,
        sparsity=sparsity,
        calibration=calibration,
        seqlen=WINDOW,
        progress=run.progress,
    )
    run.measure("pruned", model.bfloat16())
    run.step("Pack")
    report = sparsify_(model, progress=run.progress)
    run.measure("packed", model)
    run.step("Compare with what needs no pruning")
    controls = run.measure_controls(dense, report)
    run.time_decoding(dense=dense, packed=model, **controls)
    run.show(report)

    seconds = time.perf_counter() - start
    run.console.print(f"\nDone in {seconds:.0f} s, of which pruning {pruning.seconds:.0f} s.")
    if json_path is not None:
        json_path.write_text(
            run.to_json(
                report,
                method=method,
                sparsity=sparsity,
                windows=windows,
                device=str(place),
                seconds=seconds,
            )
        )
    return run.agrees()
