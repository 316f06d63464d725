"""Perplexity against a token-by-token definition."""

import math

import pytest
import torch
from torch import nn

from flash_llm import perplexity


class Recurrent(nn.Module):
    """Its logits depend on every token before, so a wrong context gives a wrong number."""

    def __init__(self, vocabulary=13):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator))
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids):
        return self.dropout(self.table[ids].cumsum(dim=1).tanh() * 3)


def brute_force_perplexity(model, ids, window, stride, max_windows):
    """Score each token with a call of its own, in the first window that contains it."""
    log_probabilities = []
    starts = list(range(0, len(ids), stride))[:max_windows]
    for position in range(1, len(ids)):
        start = next((s for s in starts if s <= position < s + window), None)
        if start is None or start == position:
            continue
        logits = model.eval()(ids[None, start:position])[0, -1].double()
        log_probabilities.append((logits - logits.logsumexp(0))[ids[position]].item())
    return math.exp(-math.fsum(log_probabilities) / len(log_probabilities))


@pytest.mark.parametrize("length", [2, 3, 9, 16, 17, 40])
@pytest.mark.parametrize(("window", "stride"), [(8, None), (8, 8), (8, 3), (8, 1), (2, 1), (64, 5)])
@pytest.mark.parametrize("max_windows", [None, 1, 3])
def test_perplexity_equals_brute_force(length, window, stride, max_windows):
    model = Recurrent()
    ids = torch.randint(0, 13, (length,))
    expected = brute_force_perplexity(model, ids, window, stride or window, max_windows)
    found = perplexity(model, ids, window=window, stride=stride, max_windows=max_windows)
    # float32 log probabilities of magnitude < 10 carry errors below 1e-5
    assert found == pytest.approx(expected, rel=1e-5)


def test_uniform_model_has_the_size_of_its_vocabulary():
    model = Recurrent()
    nn.init.zeros_(model.table)
    assert perplexity(model, torch.arange(13)[None], window=4) == pytest.approx(13.0, rel=1e-6)


def test_hopeless_model_is_infinite_not_an_error():
    model = Recurrent(2)
    model.forward = lambda ids: torch.tensor([1e4, -1e4]).expand(1, ids.shape[1], 2)
    assert perplexity(model, torch.ones(8, dtype=torch.int64)) == math.inf


def test_nan_is_not_hidden():
    model = Recurrent()
    nn.init.constant_(model.table, math.nan)
    assert math.isnan(perplexity(model, torch.arange(13)))


def test_training_mode_is_restored_and_dropout_is_off():
    model = Recurrent().train()
    ids = torch.arange(13)
    assert perplexity(model, ids, window=4) == perplexity(model, ids, window=4)
    assert model.training and model.dropout.training


def test_logits_attribute_is_understood():
    class Wrapped(Recurrent):
        def forward(self, ids):
            return type("Output", (), {"logits": super().forward(ids)})()

    ids = torch.arange(13)
    assert perplexity(Wrapped(), ids, window=4) == perplexity(Recurrent(), ids, window=4)


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        (torch.rand(9), {}, TypeError, "int32 or int64 tensor, got torch.float32"),
        ([1, 2, 3], {}, TypeError, "got list"),
        (torch.ones(1, dtype=torch.int64), {}, ValueError, "T >= 2"),
        (torch.ones(2, 9, dtype=torch.int64), {}, ValueError, r"got \[2, 9\]"),
        (torch.arange(9), {"window": 1}, ValueError, "window must be at least 2"),
        (torch.arange(9), {"window": 4, "stride": 5}, ValueError, r"\[1, window=4\], got 5"),
        (torch.arange(9), {"window": 4, "stride": 0}, ValueError, "got 0"),
        (torch.arange(9), {"max_windows": 0}, ValueError, "max_windows must be at least 1"),
    ],
)
def test_perplexity_refuses(ids, options, error, message):
    with pytest.raises(error, match=message):
        perplexity(Recurrent(), ids, **options)


def test_ids_outside_the_vocabulary_are_refused():
    model = Recurrent()
    embedding = nn.Embedding(13, 2)
    model.get_input_embeddings = lambda: embedding
    with pytest.raises(ValueError, match=r"must lie in \[0, 13\).* got 1 to 13"):
        perplexity(model, torch.tensor([1, 13]))
    with pytest.raises(ValueError, match="got -1 to 1"):
        perplexity(model, torch.tensor([1, -1]))


def test_progress_goes_through_the_callers_bar(capsys):
    seen = []

    def bar(items, description):
        seen.append((len(items), description))
        return items

    perplexity(Recurrent(), torch.arange(13), window=4, progress=bar)
    # tokens 0-3, 4-7, 8-11; the thirteenth is alone in its window and cannot be scored
    assert seen == [(3, "perplexity")]
    perplexity(Recurrent(), torch.arange(13), window=4)
    assert capsys.readouterr() == ("", "")
    perplexity(Recurrent(), torch.arange(13), window=4, progress=True)
    assert "perplexity" in capsys.readouterr().err
