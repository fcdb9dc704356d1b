"""Tests run on the CPU wherever they run, as eight devices; float64 is switched on by the tests that need it."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports JAX

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # one computation still takes one, unless its arrays are sharded

collect_ignore = ["fixtures/export_torch.py"]  # a script for where PyTorch is installed; doctests would import it


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
