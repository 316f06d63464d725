"""Packed formats: a subclass of ``PackedWeight`` for each, found by its name."""
