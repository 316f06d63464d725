"""Prune a language model offline, from one folder of transformers into another.

    python examples/prune_offline.py MODEL PRUNED --text calibration.txt --sparsity 0.5

PRUNED is an ordinary dense checkpoint, as large as MODEL, that transformers loads without
flash_llm; examples/pack_offline.py packs it.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flash_llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder with config.json, weights and tokenizer")
    parser.add_argument("pruned", help="folder to write")
    parser.add_argument("--text", required=True, help="file of calibration text")
    parser.add_argument("--method", default="sparsegpt", help="magnitude, wanda, sparsegpt or admm")
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of zeros")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens per sample")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")

    # Samples of equal length, evenly spaced over one long text.
    with open(arguments.text, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read(), verbose=False)["input_ids"])
    length = min(arguments.seqlen, len(ids))
    starts = torch.linspace(0, len(ids) - length, arguments.samples).long().tolist()
    samples = torch.stack([ids[start : start + length] for start in starts])

    report = flash_llm.prune_(
        model,
        method=arguments.method,
        sparsity=arguments.sparsity,
        calibration=samples,
        seqlen=length,
        progress=True,
    )
    print(report)
    model.save_pretrained(arguments.pruned)
    tokenizer.save_pretrained(arguments.pruned)


if __name__ == "__main__":
    main()
