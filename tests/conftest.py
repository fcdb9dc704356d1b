"""Tests run on the CPU wherever they run, as eight devices; float64 is switched on by the tests that need it.

Plain `pytest` is the short run: it holds every promise once, with as few cases as that takes. `--exhaustive` runs the
whole grids. What the short run leaves out is marked where it stands, in one of two ways:

- `@pytest.mark.exhaustive` on a test, or by `grids.short` on some of its parameters: `--exhaustive` alone runs it;
- `@pytest.mark.covering` on a test of several parameters: the short run takes so many of its cases that each value of
  each parameter occurs (with `pairs=True` each two values), besides those whose ids are given as arguments.

They are deselected, not skipped, and counted in the summary. `--left-out` runs them alone, and properties again with
more examples, so that the two runs one after the other are the whole grids. `--left-out=8` runs about an eighth of
them, always the same one, which is no pattern in any parameter.

`JXENT_ROWS="one reduction"` in the environment runs the tests with the rows of blocks as a GPU and a TPU compute them.
"""

import gc
import os
import zlib

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports JAX

import compiling
import grids
import hypothesis
import jax
import one_reduction
import pytest

# What JAX has traced lives on, in many small objects; to look among them for garbage took a third of the run.
gc.set_threshold(200_000, 20, 100)
jax.config.update("jax_num_cpu_devices", 8)  # one computation still takes one, unless its arrays are sharded

# Their assertions then show values, like those of the tests.
pytest.register_assert_rewrite("bad_calls", "sharded_calls", "sharded_layouts")

# Scripts for where PyTorch is installed; doctests would import them.
collect_ignore = ["fixtures/coming_from_torch.py", "fixtures/export_torch.py"]

# How many examples a property is tried with; "long" draws them anew each time.
hypothesis.settings.register_profile("short", max_examples=2, deadline=None, derandomize=True)
hypothesis.settings.register_profile("exhaustive", max_examples=10, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=1000, deadline=None)

if os.environ.get("JXENT_ROWS") == "one reduction":  # in one_reduction.py
    one_reduction.switch_on()

LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="run the whole grids, and not a few cases of each")
    text = "run what --exhaustive has besides the short run, alone; or about one in N of that"
    parser.addoption("--left-out", nargs="?", const=1, type=int, metavar="N", help=text)


def pytest_configure(config):
    config.addinivalue_line("markers", "exhaustive: a case for --exhaustive alone")
    config.addinivalue_line("markers", "covering(*ids, pairs=False): of these cases the short run takes a covering set")
    config.stash[LEFT_OUT] = 0
    exhaustive = config.getoption("--exhaustive") or config.getoption("--left-out")
    profile = os.environ.get("HYPOTHESIS_PROFILE", "exhaustive" if exhaustive else "short")
    hypothesis.settings.load_profile(profile)
    if not config.getoption("--exhaustive"):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compiling.QUICK_FLAGS}"


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    if config.getoption("--exhaustive"):
        return
    taken = grids.short_run(items)
    if one_in := config.getoption("--left-out"):
        left_out = [item for item in items if item not in taken and zlib.crc32(item.nodeid.encode()) % one_in == 0]
        taken = {*left_out, *(item for item in items if hypothesis.is_hypothesis_test(item.obj))}
    kept = [item for item in items if item in taken]
    left_out = [item for item in items if item not in taken]
    config.stash[LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


# With pytest-xdist the workers select, all of them the same, and the process that reports has to be told.
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    if (number := config.stash[LEFT_OUT]) and not config.getoption("--left-out"):
        terminalreporter.write_line(f"{number} more cases run with --exhaustive")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
