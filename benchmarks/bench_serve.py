"""Serving in vLLM: dense, FP8 and packed layers of one model in one run each.

    python benchmarks/bench_serve.py --model llama-8b --sparsity 0.5 0.7 --batch 1 8 32 64
    python benchmarks/bench_serve.py --model llama-8b --sparsity 0.5 --rate 1 4 16

Weights are random (``load_format="dummy"``); packed ones are pruned by magnitude while they load.
Without ``--rate`` all requests of a batch begin together and have the same lengths: the time of a
step is the median of those in which each request gets a token. With ``--rate`` requests of spread
lengths arrive at random (Poisson): the same ones for all contenders. Each engine has a process of
its own. Rows go to ``benchmarks/results/serve-<gpu>.jsonl``. Needs vLLM (extra ``vllm``).
"""

import argparse
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
from options import require_fractions, require_positive
from rows import RESULTS, check_row, commit_hash, cpu_name, gpu_name, print_table, write_rows

WEIGHTS = ("dense", "fp8", "flash_llm")
MODES: dict[str, dict[str, Any]] = {
    "compiled": {},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "eager": {"enforce_eager": True},
}
"""Options of ``vllm.LLM``: its default; CUDA graphs of decoding alone, which start in seconds."""
PROMPTS, OUTPUTS = (64, 2048), (32, 512)
"""Shortest and longest of the requests that arrive at random, evenly spread between them."""


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


def serve(llm: Any, requests: Sequence[Request]) -> list[list[float]]:
    """Feed requests to an engine as they arrive; return the times at which each got its tokens."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    vocabulary = llm.model_config.get_vocab_size()
    draw = random.Random(1)  # prompts differ, so that no prefix is cached
    waiting = sorted(enumerate(requests), key=lambda entry: entry[1].arrival)
    times: list[list[float]] = [[] for _ in requests]
    start = time.perf_counter()
    while waiting or engine.has_unfinished_requests():
        now = time.perf_counter() - start
        while waiting and waiting[0][1].arrival <= now:
            i, request = waiting.pop(0)
            tokens = [draw.randrange(vocabulary) for _ in range(request.prompt)]
            greedy = SamplingParams(
                temperature=0, max_tokens=request.new_tokens, ignore_eos=True, detokenize=False
            )
            engine.add_request(f"{start}-{i}", {"prompt_token_ids": tokens}, greedy)
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
        "max_model_len": max(longest, arguments.prompt + arguments.new_tokens),
        "max_num_seqs": max(256, *arguments.batch),
        **MODES[arguments.mode],
    }
    if contender.weights == "fp8":
        options["quantization"] = "fp8"
    if contender.weights == "flash_llm":
        quantization = {"quant_method": "flash_llm", "sparsity": contender.sparsity}
        options["hf_overrides"] = {"quantization_config": quantization}
    return options


def facts(llm: Any) -> dict[str, Any]:
    """Return what an engine made of its model: bytes on each GPU, the packed format, its cache."""

    def of_model(model: torch.nn.Module) -> tuple[int, list[int]]:
        parameters = {id(parameter): parameter for parameter in model.parameters()}
        headers = [getattr(layer, "packed_header", None) for layer in model.modules()]
        return (
            sum(parameter.nbytes for parameter in parameters.values()),
            sorted({header.format for header in headers if header is not None}),
        )

    from flash_llm import PackedWeight

    found = llm.apply_model(of_model)
    formats = sorted({number for _, numbers in found for number in numbers})
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "format": ",".join(PackedWeight.class_for(number).FORMAT for number in formats) or None,
        "weights_gb": round(sum(nbytes for nbytes, _ in found) / 1e9, 3),
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
    }


def measure(folder: str, contender: Contender, arguments: argparse.Namespace) -> list[dict]:
    """Start an engine and measure all of its rows; called in a process of its own."""
    # Steps are timed in this process; closures are sent to the workers of several GPUs.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    import vllm

    on_gpu = torch.cuda.is_available()
    started = time.perf_counter()
    llm = vllm.LLM(model=folder, **engine_options(contender, arguments))
    start_s = time.perf_counter() - started
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
    }
    tail = {
        # vLLM keeps dense weights elsewhere on a CPU.
        "weights_gb": of_model["weights_gb"] if on_gpu else None,
        "kv_tokens": of_model["kv_tokens"],
        "start_s": round(start_s, 1),
        "mode": arguments.mode,
        "torch": str(torch.__version__),
        "commit": arguments.commit,
    }
    kinds = replayed(llm, arguments) if arguments.rate else static(llm, arguments)
    found = []
    for bench, middle in kinds:
        row = {"bench": bench, **head, **middle, **tail}
        check_row(row)
        found.append(row)
    return found


def static(llm: Any, arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure batches whose requests begin together."""
    for batch in arguments.batch:
        requests = [Request(0.0, arguments.prompt, arguments.new_tokens)] * batch
        serve(llm, requests)  # what is made at the first call of a size is not timed
        times = serve(llm, requests)
        step = statistics.median(step_times(times))
        yield (
            "serve",
            {
                "batch": batch,
                "prompt": arguments.prompt,
                "new_tokens": arguments.new_tokens,
                "step_ms": round(1e3 * step, 3),
                "tok_per_gpu_s": round(batch / step / arguments.gpus, 2),
                "ttft_ms": round(1e3 * statistics.median(found[0] for found in times), 3),
            },
        )


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
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5], help="of flash_llm")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new-tokens", dest="new_tokens", type=int, default=64)
    parser.add_argument("--rate", nargs="+", type=float, default=[], help="requests per second")
    parser.add_argument("--requests", type=int, default=128, help="at each rate")
    parser.add_argument("--gpus", type=int, default=1, help="tensor parallel size")
    parser.add_argument("--mode", choices=MODES, default="compiled")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--commit", help="default: FLASH_LLM_COMMIT, else git")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/serve-<gpu>.jsonl")
    arguments = parser.parse_args(argv)
    require_positive(parser, arguments, "prompt", "requests", "gpus")
    require_fractions(parser, arguments.sparsity)
    if arguments.new_tokens < 3:  # the first comes with the prompt, and a step lies between two
        parser.error(f"--new-tokens must be at least 3, got {arguments.new_tokens}")
    if min(arguments.batch) < 1:
        parser.error(f"--batch must be positive, got {min(arguments.batch)}")
    if any(rate <= 0 for rate in arguments.rate):
        parser.error(f"--rate must be positive, got {min(arguments.rate)}")
    if arguments.model not in MODELS and not Path(arguments.model, "config.json").is_file():
        parser.error(f"--model must be {', '.join(MODELS)} or a folder, got {arguments.model}")
    arguments.commit = commit_hash(arguments.commit)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = parse_arguments(argv)
    contenders = [
        Contender(weights, sparsity)
        for weights in arguments.weights
        for sparsity in (arguments.sparsity if weights == "flash_llm" else [0.0])
    ]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model in MODELS:
            Path(folder, "config.json").write_text(json.dumps(MODELS[arguments.model]))
        else:
            folder, arguments.model = arguments.model, Path(arguments.model).resolve().name
        for contender in contenders:
            # A process gives its memory back; vLLM does not.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
                rows = pool.submit(measure, folder, contender, arguments).result()
            write_rows(arguments.out or RESULTS / f"serve-{rows[0]['gpu']}.jsonl", rows)
            found += rows
    headings = (
        "weights",
        "sparsity",
        "batch or rate",
        "tok/s per GPU",
        "step or TPOT ms",
        "TTFT ms",
    )
    print_table(headings, [_line(row) for row in found])
    return 0


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    if row["bench"] == "serve":
        size, step, first = row["batch"], row["step_ms"], row["ttft_ms"]
    else:
        size, step, first = row["rate"], row["tpot_ms"]["p50"], row["ttft_ms"]["p50"]
    return (
        row["weights"],
        f"{row['sparsity']:g}",
        f"{size:g}",
        f"{row['tok_per_gpu_s']:.1f}",
        f"{step:.2f}",
        f"{first:.1f}",
    )


if __name__ == "__main__":
    sys.exit(main())
