"""Checkpoints: packed weights in files, conversion, and reports on and comparison of folders."""
