"""Checkpoints: packed weights in files, conversion, inspection and comparison of folders."""
