"""Serving in vLLM: dense, FP8 and packed layers of one model in one run each.

    python benchmarks/bench_serve.py --model llama-8b --sparsity 0.5 0.7 --batch 1 8 32 64
    python benchmarks/bench_serve.py --model llama-8b --sparsity 0.5 --batch --rate 1 4 16

Weights are random (``load_format="dummy"``); packed ones are pruned by magnitude while they load.
All requests of a ``--batch`` begin together and have the same lengths: the time of a step is the
median of those in which each request gets a token. ``--prefill`` measures single prompts of other
lengths, ``--account`` where the time of a step goes, by the kernels that a profiler sees. With
``--rate`` requests of spread lengths arrive at random (Poisson): the same ones for all contenders.
Each engine has a process of its own and takes all measurements. ``--together`` starts the engines
at once, which is faster; they wait for each other and are measured one after the other. Rows go to
``benchmarks/results/serve-<gpu>.jsonl``. Needs vLLM (extra ``vllm``).
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_spmm import ROUNDED_X
from options import require_fractions, require_positive
from rows import RESULTS, commit_hash, cpu_name, gpu_name, print_table, write_rows
from step_account import account
from stream_floor import StreamFloor

from flash_llm.ops import STORED_VALUES, X_QUANTIZATIONS

WEIGHTS = {"dense": "16-bit", "fp8": "fp8_e4m3", "flash_llm": None}
"""What engines multiply by, and the values of weights and inputs; options for packed weights."""
MODES: dict[str, dict[str, Any]] = {
    "compiled": {},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "eager": {"enforce_eager": True},
}
"""Options of ``vllm.LLM``: its default; CUDA graphs of decoding alone, which start in seconds."""
PROMPTS, OUTPUTS = (64, 2048), (32, 512)
"""Shortest and longest of the requests that arrive at random, evenly spread between them."""
FEWEST_TOKENS = 3
"""To measure a step: the first token comes with the prompt, and a step lies between two others."""
PROFILED_STEPS = 8
LARGEST_BATCH = 512
"""vLLM captures no CUDA graphs above it."""


def _llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256},
        **{"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads},
        **{"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    }


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        **{"architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 50272},
        **{"hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "word_embed_proj_dim": hidden},
        **{"max_position_embeddings": 4096, "do_layer_norm_before": True},
    }


MODELS = {
    "llama-8b": _llama(4096, 14336, 32, 32, 8),
    "llama-70b": _llama(8192, 28672, 80, 64, 8),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
}
"""Sizes of models by name; OPT with more positions than its 2048, for the longest requests."""


class Contender(NamedTuple):
    """One engine."""

    weights: str  # one of WEIGHTS
    sparsity: float  # 0 but for flash_llm
    values: str
    x_values: str  # what products may round their inputs to


class Turns(NamedTuple):
    """How engines that start at once take turns."""

    ready: Any  # multiprocessing.Barrier of all engines
    measuring: Any  # multiprocessing.Lock


_turns: Turns | None = None
"""Of this process; None if its engine is alone."""


def take_turns(turns: Turns | None) -> None:
    """Set how the engine of this process takes turns with others."""
    global _turns
    _turns = turns


class Request(NamedTuple):
    """What one user asks for."""

    arrival: float  # seconds after the start
    prompt: int  # tokens
    new_tokens: int


def spread_requests(rate: float, number: int, seed: int = 0) -> list[Request]:
    """Return requests of spread lengths that arrive at random.

    Args:
        rate: requests per second, on average.
        number: of requests.
        seed: of the lengths and arrivals.
    """
    draw = random.Random(seed)
    arrival, requests = 0.0, []
    for _ in range(number):
        arrival += draw.expovariate(rate)
        requests.append(Request(arrival, draw.randint(*PROMPTS), draw.randint(*OUTPUTS)))
    return requests


def add_request(engine: Any, name: str, request: Request, draw: random.Random) -> None:
    """Give an engine one request with a random prompt."""
    from vllm import SamplingParams

    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    tokens = [draw.randrange(vocabulary) for _ in range(request.prompt)]
    greedy = SamplingParams(
        temperature=0, max_tokens=request.new_tokens, ignore_eos=True, detokenize=False
    )
    engine.add_request(name, {"prompt_token_ids": tokens}, greedy)


def serve(llm: Any, requests: Sequence[Request]) -> list[list[float]]:
    """Feed requests to an engine as they arrive; return the times at which each got its tokens."""
    engine = llm.llm_engine
    draw = random.Random(1)
    waiting = sorted(enumerate(requests), key=lambda entry: entry[1].arrival)
    times: list[list[float]] = [[] for _ in requests]
    start = time.perf_counter()
    while waiting or engine.has_unfinished_requests():
        now = time.perf_counter() - start
        while waiting and waiting[0][1].arrival <= now:
            i, request = waiting.pop(0)
            add_request(engine, f"{start}-{i}", request, draw)
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, waiting[0][1].arrival - now))
            continue
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            found = times[int(output.request_id.rpartition("-")[2])]
            found += [now] * (len(output.outputs[0].token_ids) - len(found))
    return times


def step_times(times: list[list[float]]) -> list[float]:
    """Return the seconds of the steps in which each of the requests got a token."""
    stamps = [set(of_request) for of_request in times]
    common = sorted(set.intersection(*stamps))
    every = sorted(set.union(*stamps))
    return [b - a for a, b in zip(every, every[1:], strict=False) if a in common and b in common]


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile of seconds, in milliseconds."""
    ordered = sorted(values)
    return {
        name: round(1e3 * ordered[min(len(ordered) - 1, int(part * len(ordered)))], 3)
        for name, part in (("p50", 0.5), ("p99", 0.99))
    }


def engine_options(contender: Contender, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what ``vllm.LLM`` is to be called with."""
    longest = sum(max(pair) for pair in (PROMPTS, OUTPUTS)) if arguments.rate else 0
    options: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": arguments.dtype,
        "tensor_parallel_size": arguments.gpus,
        "max_model_len": max(
            longest,
            arguments.prompt + arguments.new_tokens,
            *(n + FEWEST_TOKENS for n in arguments.prefill),
        ),
        "max_num_seqs": LARGEST_BATCH if arguments.largest else max([256, *arguments.batch]),
        "enable_prefix_caching": False,  # the same prompts come again in each round
        **MODES[arguments.mode],
    }
    if arguments.together:
        # vLLM's own count of free memory would go wrong while others allocate.
        cache = int(arguments.together * 1e9)
        options |= {"kv_cache_memory_bytes": cache, "gpu_memory_utilization": 0.01}
    if contender.weights == "fp8":
        options["quantization"] = "fp8"
    if contender.weights == "flash_llm":
        quantization = {
            "quant_method": "flash_llm",
            "sparsity": contender.sparsity,
            "values": contender.values,
        }
        if contender.x_values != "16-bit":
            quantization["x_quantization"] = "dynamic"
        options["hf_overrides"] = {"quantization_config": quantization}
    return options


def facts_of_model(model: torch.nn.Module) -> tuple[int, int, list[int]]:
    """Return a part's bytes, those that a step reads, and the numbers of its packed formats.

    Several GPUs have a process each, which gets this function by its name.
    """
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    headers = [getattr(layer, "packed_header", None) for layer in model.modules()]
    # A step reads a row of each embedding; one that is tied to the head is its own module.
    embeddings = [
        parameter.nbytes
        for layer in model.modules()
        if type(layer).__name__ == "VocabParallelEmbedding"
        and not getattr(model.config, "tie_word_embeddings", False)
        for parameter in layer.parameters()
    ]
    total = sum(parameter.nbytes for parameter in parameters.values())
    return (
        total,
        total - sum(embeddings),
        sorted({header.format for header in headers if header is not None}),
    )


def facts(llm: Any) -> dict[str, Any]:
    """Return what an engine made of its model: bytes on all GPUs, the packed format, its cache."""
    from flash_llm import PackedWeight

    found = llm.apply_model(facts_of_model)
    formats = sorted({number for *_, numbers in found for number in numbers})
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "format": ",".join(PackedWeight.class_for(number).FORMAT for number in formats) or None,
        "weights_gb": round(sum(nbytes for nbytes, *_ in found) / 1e9, 3),
        "step_gb": max(nbytes for _, nbytes, _ in found) / 1e9,  # that one GPU reads in a step
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
    }


def measure(folder: str, contender: Contender, arguments: argparse.Namespace) -> list[dict]:
    """Start an engine and measure all of its rows; called in a process of its own."""
    # Steps are timed in this process; functions are sent to those of several GPUs.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    import vllm

    on_gpu = torch.cuda.is_available()
    started = time.perf_counter()
    try:
        llm = vllm.LLM(model=folder, **engine_options(contender, arguments))
    except BaseException:
        if _turns is not None:
            _turns.ready.abort()
        raise
    start_s = time.perf_counter() - started
    if _turns is not None:
        _turns.ready.wait()
    of_model = facts(llm)
    head = {
        "engine": f"vllm {vllm.__version__}",
        "gpu": gpu_name(torch.cuda.get_device_name())
        if on_gpu
        else cpu_name(Path("/proc/cpuinfo").read_text()),
        "gpus": arguments.gpus,
        "model": arguments.model,
        "weights": contender.weights,
        "format": of_model["format"],
        "sparsity": contender.sparsity,
        "values": contender.values,
        "x_values": contender.x_values,
    }
    tail = {
        # vLLM keeps dense weights elsewhere on a CPU.
        "weights_gb": of_model["weights_gb"] if on_gpu else None,
        "kv_tokens": of_model["kv_tokens"],
        "start_s": round(start_s, 1) if _turns is None else None,
        "mode": arguments.mode,
        "torch": str(torch.__version__),
        "commit": arguments.commit,
    }
    found = []
    with contextlib.nullcontext() if _turns is None else _turns.measuring:
        for bench, middle in measurements(llm, of_model, arguments):
            found.append({"bench": bench, **head, **middle, **tail})
            # One at a time, so that an engine that ends early leaves what it has measured.
            write_rows(arguments.out or RESULTS / f"serve-{head['gpu']}.jsonl", found[-1:])
    return found


def measurements(
    llm: Any, of_model: dict[str, Any], arguments: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Take all measurements that were asked for: the kind of a row and its own fields."""
    batches = list(arguments.batch)
    if arguments.largest:
        fit = of_model["kv_tokens"] // (arguments.prompt + arguments.new_tokens)
        batches.append(min(fit, LARGEST_BATCH))
    for batch in batches:
        yield "serve", static(llm, batch, arguments.prompt, arguments.new_tokens)
    for prompt in arguments.prefill:
        yield "serve", static(llm, 1, prompt, FEWEST_TOKENS)
    for batch in arguments.account:
        yield "step", accounted(llm, batch, arguments.prompt, of_model["step_gb"])
    if arguments.rate:
        yield from replayed(llm, arguments)


def static(llm: Any, batch: int, prompt: int, new_tokens: int) -> dict[str, Any]:
    """Measure a batch whose requests begin together."""
    requests = [Request(0.0, prompt, new_tokens)] * batch
    serve(llm, requests)  # what is made at the first call of a size is not timed
    firsts, steps = [], []
    for _ in range(3):
        times = serve(llm, requests)
        firsts += [found[0] for found in times]
        steps += step_times(times)
    step = statistics.median(steps)
    return {
        "batch": batch,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "step_ms": round(1e3 * step, 3),
        "tok_per_gpu_s": round(
            batch / step / llm.llm_engine.vllm_config.parallel_config.world_size, 2
        ),
        "ttft_ms": round(1e3 * statistics.median(firsts), 3),
    }


def accounted(llm: Any, batch: int, prompt: int, step_gb: float) -> dict[str, Any]:
    """Measure where the time of a decode step goes."""
    engine, draw = llm.llm_engine, random.Random(2)
    for i in range(batch):
        add_request(engine, f"account-{i}", Request(0.0, prompt, 4 * PROFILED_STEPS), draw)
    for _ in range(PROFILED_STEPS):  # past the prompts
        engine.step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(PROFILED_STEPS):
        engine.step()
    torch.cuda.synchronize()
    step_ms = 1e3 * (time.perf_counter() - start) / PROFILED_STEPS
    kinds = account(engine.step, PROFILED_STEPS)
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "batch": batch,
        "prompt": prompt,
        "step_ms": round(step_ms, 3),
        "kinds_ms": kinds,
        "gaps_ms": round(step_ms - sum(kinds.values()), 3),
        "floor_ms": round(1e3 * step_gb / read_speed(), 3),
    }


def read_speed() -> float:
    """Return how many GB per second a plain read of memory takes."""
    from flash_llm.timing import time_cuda

    buffer = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    floor = StreamFloor()
    timing = time_cuda({"read": [lambda: floor.read(buffer)]})["read"]
    return buffer.nbytes / 1e3 / timing.us


def replayed(llm: Any, arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure requests of spread lengths that arrive at random."""
    serve(llm, [Request(0.0, PROMPTS[0], OUTPUTS[0])])
    for rate in arguments.rate:
        requests = spread_requests(rate, arguments.requests)
        times = serve(llm, requests)
        tokens = sum(map(len, times))
        seconds = max(found[-1] for found in times) - requests[0].arrival
        yield (
            "replay",
            {
                "rate": rate,
                "requests": arguments.requests,
                "tok_per_gpu_s": round(tokens / seconds / arguments.gpus, 2),
                "ttft_ms": percentiles(
                    [found[0] - asked.arrival for found, asked in zip(times, requests, strict=True)]
                ),
                "tpot_ms": percentiles(
                    [(found[-1] - found[0]) / (len(found) - 1) for found in times]
                ),
            },
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or a folder")
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5], help="of flash_llm")
    parser.add_argument(
        "--values", nargs="+", choices=STORED_VALUES, default=["16-bit"], help="of flash_llm"
    )
    parser.add_argument(
        "--x-quantization",
        dest="x_quantization",
        nargs="+",
        choices=X_QUANTIZATIONS,
        default=["none"],
        help="of the inputs of quantised values",
    )
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8, 32, 64])
    parser.add_argument(
        "--largest",
        action="store_true",
        help=f"and as many as the cache holds, {LARGEST_BATCH} at most",
    )
    parser.add_argument("--prefill", nargs="+", type=int, default=[], help="tokens of one prompt")
    parser.add_argument("--account", nargs="+", type=int, default=[], help="batches; needs a GPU")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new-tokens", dest="new_tokens", type=int, default=64)
    parser.add_argument("--rate", nargs="+", type=float, default=[], help="requests per second")
    parser.add_argument("--requests", type=int, default=128, help="at each rate")
    parser.add_argument("--gpus", type=int, default=1, help="tensor parallel size")
    parser.add_argument(
        "--together", type=float, metavar="GB", help="start all at once, each with a cache of GB"
    )
    parser.add_argument("--mode", choices=MODES, default="compiled")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--commit", help="default: FLASH_LLM_COMMIT, else git")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/serve-<gpu>.jsonl")
    arguments = parser.parse_args(argv)
    require_positive(parser, arguments, "prompt", "requests", "gpus")
    require_fractions(parser, arguments.sparsity)
    if arguments.new_tokens < FEWEST_TOKENS:
        parser.error(f"--new-tokens must be at least {FEWEST_TOKENS}, got {arguments.new_tokens}")
    for name in ("batch", "prefill", "account", "rate"):
        values = getattr(arguments, name)
        if any(value <= 0 for value in values):
            parser.error(f"--{name} must be positive, got {min(values)}")
    if arguments.model not in MODELS and not Path(arguments.model, "config.json").is_file():
        parser.error(f"--model must be {', '.join(MODELS)} or a folder, got {arguments.model}")
    if arguments.account and arguments.gpus > 1:
        parser.error("--account sees the kernels of this process alone: it needs --gpus 1")
    if arguments.together is not None and arguments.together <= 0:
        parser.error(f"--together must be positive, got {arguments.together}")
    if arguments.x_quantization != ["none"] and set(arguments.values) == {"16-bit"}:
        parser.error("--x-quantization needs quantised --values")
    arguments.commit = commit_hash(arguments.commit)
    return arguments


def contenders_of(arguments: argparse.Namespace) -> Iterator[Contender]:
    """Yield the engines that the command line names."""
    for weights in arguments.weights:
        of_all = WEIGHTS[weights]
        if of_all is not None:
            yield Contender(weights, 0.0, of_all, of_all)
            continue
        for sparsity, values in itertools.product(arguments.sparsity, arguments.values):
            quantized = values != "16-bit"
            for way in arguments.x_quantization if quantized else ["none"]:
                x_values = ROUNDED_X[values] if way == "dynamic" else "16-bit"
                yield Contender(weights, sparsity, values, x_values)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = parse_arguments(argv)
    contenders = list(contenders_of(arguments))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model in MODELS:
            Path(folder, "config.json").write_text(json.dumps(MODELS[arguments.model]))
        else:
            folder, arguments.model = arguments.model, Path(arguments.model).resolve().name
        context = multiprocessing.get_context("spawn")
        turns = None
        if arguments.together:
            turns = Turns(context.Barrier(len(contenders)), context.Lock())
        at_once = len(contenders) if arguments.together else 1
        for first in range(0, len(contenders), at_once):
            with contextlib.ExitStack() as stack:
                # A process gives its memory back; vLLM does not.
                running = [
                    stack.enter_context(
                        ProcessPoolExecutor(1, context, initializer=take_turns, initargs=(turns,))
                    ).submit(measure, folder, contender, arguments)
                    for contender in contenders[first : first + at_once]
                ]
                for future in running:
                    found += future.result()
    headings = (
        "weights",
        "sparsity",
        "values x X",
        "batch or rate",
        "tok/s per GPU",
        "step or TPOT ms",
        "TTFT ms",
    )
    print_table(headings, [_line(row) for row in found if row["bench"] != "step"])
    for row in found:
        if row["bench"] == "step":
            print(json.dumps(row))
    return 0


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    if row["bench"] == "serve":
        size, step, first = row["batch"], row["step_ms"], row["ttft_ms"]
    else:
        size, step, first = row["rate"], row["tpot_ms"]["p50"], row["ttft_ms"]["p50"]
    return (
        row["weights"],
        f"{row['sparsity']:g}",
        f"{row['values']} x {row['x_values']}",
        f"{size:g}",
        f"{row['tok_per_gpu_s']:.1f}",
        f"{step:.2f}",
        f"{first:.1f}",
    )


if __name__ == "__main__":
    sys.exit(main())
