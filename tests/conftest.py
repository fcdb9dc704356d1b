"""Tests run on the CPU wherever they run; float64 is switched on by the tests that need it."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports JAX

import jax
import pytest

collect_ignore = ["fixtures/export_torch.py"]  # a script for where PyTorch is installed; doctests would import it


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
