"""Named weight shapes M x K (out_features x in_features) of models that people serve.

OPT fuses Q, K and V into one product, as Flash-LLM's own benchmark does. The Llama shapes are those
of Llama 3 8B (hidden 4096, MLP 14336) and 70B (hidden 8192, MLP 28672); ``.o`` stands for each
attention projection of hidden x hidden.
"""

SHAPES: dict[str, tuple[int, int]] = {
    "opt-30b.qkv": (21504, 7168),
    "opt-30b.out": (7168, 7168),
    "opt-30b.fc1": (28672, 7168),
    "opt-30b.fc2": (7168, 28672),
    "opt-66b.qkv": (27648, 9216),
    "opt-66b.out": (9216, 9216),
    "opt-66b.fc1": (36864, 9216),
    "opt-66b.fc2": (9216, 36864),
    "opt-175b.qkv": (36864, 12288),
    "opt-175b.out": (12288, 12288),
    "opt-175b.fc1": (49152, 12288),
    "opt-175b.fc2": (12288, 49152),
    "llama-8b.o": (4096, 4096),
    "llama-8b.gate": (14336, 4096),
    "llama-8b.down": (4096, 14336),
    "llama-70b.o": (8192, 8192),
    "llama-70b.gate": (28672, 8192),
    "llama-70b.down": (8192, 28672),
}


def parse_shape(text: str) -> tuple[int, int]:
    """Return (M, K) of a name in :data:`SHAPES` or of text such as ``28672x7168``.

    Raises:
        ValueError: the text is neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split("x")
    if len(parts) == 2 and all(part.isdecimal() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[1])
    raise ValueError(f"shape must be MxK or one of {', '.join(SHAPES)}, got {text!r}")


def model_shapes(prefix: str) -> list[str]:
    """Return the names that begin with ``prefix``, such as ``opt-30b``."""
    return [name for name in SHAPES if name == prefix or name.startswith(f"{prefix}.")]
