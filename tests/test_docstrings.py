"""Docstrings: every example runs, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import flash_llm


def module_names():
    found = pkgutil.walk_packages(flash_llm.__path__, "flash_llm.")
    # Compiled, or imported by vLLM alone, which has an environment of its own.
    others = ("._C", ".libflash_llm", ".vllm.config", ".vllm.linear_method")
    return ["flash_llm", *(m.name for m in found if not m.name.endswith(others))]


@pytest.mark.parametrize("name", module_names())
def test_examples_run(name):
    torch.manual_seed(0)
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_there_are_examples_to_run():
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in module_names()]
    examples = [t for module in modules for t in finder.find(module) if t.examples]
    assert len(examples) >= 5


@pytest.mark.parametrize("name", [n for n in flash_llm.__all__ if n != "__version__"])
def test_public_names_are_documented(name):
    documented = getattr(flash_llm, name)
    doc = inspect.getdoc(documented)
    assert doc and len(doc) > 40
    if inspect.isfunction(documented):
        if inspect.signature(documented).parameters:
            assert "Args:" in doc
        assert "Raises:" in doc
