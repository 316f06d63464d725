"""For each forward pass of a model: evaluation mode, and a check of the token ids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every submodule in ``eval()`` and disable gradients; on exit restore each one's flag."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def check_token_ids(token_ids: Tensor, model: nn.Module) -> None:
    """Check that ids are in the model's vocabulary; on CUDA other ids would abort the context.

    Args:
        token_ids: integer tensor of any shape.
        model: with Hugging Face's ``get_input_embeddings``; other models are not checked.

    Raises:
        ValueError: an id is negative or not below the number of embeddings.
    """
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    if isinstance(embedding, nn.Embedding) and token_ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(token_ids))
        if low < 0 or high >= embedding.num_embeddings:
            raise ValueError(
                f"token ids must lie in [0, {embedding.num_embeddings}), the model's vocabulary, "
                f"got {low} to {high}"
            )
