"""What compressed-tensors stores of a weight, written here without it.

Checked against its versions 0.8.1, 0.9.4, 0.12.2 and 0.13.0, the last that write sparse formats.
"""

import numpy as np
import torch


def as_sparse_bitmask(name, weight):
    """The format ``sparse-bitmask``; ``name`` is the layer's, up to version 0.8 the weight's."""
    mask = weight != 0
    counts = mask.sum(-1)
    # Not all dtypes of one byte can be indexed.
    raw = weight.view(torch.uint8) if weight.itemsize == 1 else weight
    return {
        f"{name}.shape": torch.tensor(weight.shape),
        f"{name}.compressed": raw[mask].view(weight.dtype),
        f"{name}.bitmask": torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")),
        f"{name}.row_offsets": torch.cumsum(counts, 0) - counts,
    }


def as_two_four(name, weight):
    """The format ``sparse-24-bitmask`` of a weight with at most two nonzeros in every four columns.

    Two of each four are stored, zeros too.
    """
    m, k = weight.shape
    nonzero = (weight != 0).reshape(m, k // 4, 4)
    places = nonzero.int().argsort(dim=-1, descending=True, stable=True)[..., :2]
    mask = torch.zeros_like(nonzero).scatter(-1, places, True).reshape(m, k)
    raw = weight.view(torch.uint8) if weight.itemsize == 1 else weight
    return {
        f"{name}.shape": torch.tensor([[m], [k]]),
        f"{name}.compressed": raw[mask].view(weight.dtype).reshape(m, k // 2),
        f"{name}.bitmask": torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")),
    }


def quantization_config(format, sparsity="dense", **changes):
    """The ``quantization_config`` of a model whose linear layers are quantised."""
    weights = {"num_bits": 8, "type": "float" if "float" in format else "int"}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {"format": sparsity},
        **changes,
    }
