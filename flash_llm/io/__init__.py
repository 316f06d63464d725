"""Checkpoints: packed weights in files, conversion, and what compares and describes folders."""
