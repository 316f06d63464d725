"""Integrations with transformers, its tensor parallelism, and PEFT."""
