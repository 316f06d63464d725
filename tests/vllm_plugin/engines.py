"""Engines of toy models, what they generate, and when two have generated the same."""

import contextlib

import pytest

PROMPTS = [{"prompt_token_ids": [(7 * i + n) % 256 for i in range(n)]} for n in (3, 17, 40)]


@contextlib.contextmanager
def engine(model, **options):
    """An engine that is gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"dtype": "bfloat16", "max_model_len": 128, "enforce_eager": True} | options
    try:
        llm = LLM(model=str(model), skip_tokenizer_init=True, seed=0, **options)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
    finally:
        cleanup_dist_env_and_memory()


def generate(llm, **options):
    """Greedy tokens of the prompts, and the log-probabilities of the first ones by token."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=8, detokenize=False, ignore_eos=True, logprobs=5
    )
    results = llm.generate(PROMPTS, greedy, use_tqdm=False, **options)
    outputs = [result.outputs[0] for result in results]
    first = [
        {token: entry.logprob for token, entry in output.logprobs[0].items()} for output in outputs
    ]
    return [list(output.token_ids) for output in outputs], first


def assert_same(found, expected):
    """The same tokens, and the same log-probabilities within rounding."""
    assert found[0] == expected[0]
    assert_close(found, expected)


def assert_close(found, expected):
    """Log-probabilities of the first tokens within what bfloat16 rounds."""
    for mine, theirs in zip(found[1], expected[1], strict=True):
        common = mine.keys() & theirs.keys()
        assert len(common) >= 4  # of the five most likely
        for token in common:
            assert mine[token] == pytest.approx(theirs[token], abs=0.1)
