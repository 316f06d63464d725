"""Pack a pruned checkpoint offline, check the result, and answer a prompt with it.

    python examples/pack_offline.py PRUNED PACKED --prompt "The capital of France is"

PRUNED is any folder of safetensors with zeros in its weights, from any pruner. Files are packed one
by one: no model is built, and memory for about two tensors is enough. After an interruption, run it
again to continue. The shell commands ``flash-llm convert`` and ``flash-llm verify`` do the same.
"""

import argparse

import flash_llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pruned", help="folder of safetensors, dense, with zeros")
    parser.add_argument("packed", help="folder to write; it must not exist")
    parser.add_argument("--workers", type=int, default=1, help="files to convert at once")
    parser.add_argument("--prompt", help="load the packed model and complete this text")
    arguments = parser.parse_args()

    # Each layer is packed if that makes it smaller; the report gives each decision and its reason.
    report = flash_llm.convert_checkpoint(
        arguments.pruned, arguments.packed, workers=arguments.workers, progress=True
    )
    print(report)

    # Packing keeps every bit, so any difference would be a bug.
    comparison = flash_llm.verify_checkpoint(arguments.packed, arguments.pruned)
    if comparison.max_relative_error > 0.0:
        raise SystemExit(str(comparison))

    if arguments.prompt is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.packed)
        model = flash_llm.from_pretrained(arguments.packed, device_map="auto")
        inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
        print(tokenizer.decode(model.generate(**inputs, max_new_tokens=30, do_sample=False)[0]))


if __name__ == "__main__":
    main()
