"""The package as a whole: it uses nothing private of JAX, its import leaves JAX alone, and its tests are listed."""

import ast
import inspect
import pathlib
import pydoc
import re
import subprocess
import sys
import tomllib
import typing

import jax
import numpy as np
import pytest

import jxent
from jxent._call import annotations

PACKAGE = pathlib.Path(jxent.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_private_of_jax(source):
    """Neither modules that JAX does not document, nor names with an underscore in those that it does."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [(getattr(node, "module", None), alias) for node in imported for alias in node.names]
    of_jax = {"jax"} | {
        alias.asname or alias.name for module, alias in modules if (module or alias.name).split(".")[0] == "jax"
    }
    used = [f"{module or ''}.{alias.name}" for module, alias in modules if not (module or "").startswith("jxent")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in of_jax:
            used.append(ast.unparse(node))
    private = {name for name in used if any(part.startswith("_") for part in name.split(".")) or "jaxlib" in name}
    # The rules of checkify have no public place. jxent does without them where they are not to be had.
    allowed = {"_core/reports.py": {"jax._src.checkify.error_checks"}}
    assert private - {"__future__.annotations"} == allowed.get(source.relative_to(PACKAGE).as_posix(), set())


FUNCTIONS = [name for name in jxent.__all__ if name.islower()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name):
    """`help` shows them as they are written; and what checks types at run time can read them."""
    function = getattr(jxent, name)
    text = pydoc.render_doc(function, renderer=pydoc.plaintext)
    assert "ArrayLike" in text
    assert "jaxlib" not in text
    assert set(typing.get_type_hints(function)) == {*inspect.signature(function).parameters, "return"}


def test_help_lists_the_functions():
    """First what each is for, then the functions themselves."""
    text = pydoc.render_doc(jxent, renderer=pydoc.plaintext)
    assert all(f"\n    {name}(" in text for name in FUNCTIONS)
    assert set(re.findall(r"\w+", text.partition("\nPACKAGE CONTENTS")[0])) >= set(jxent.__all__)


@pytest.mark.parametrize("name", jxent.__all__)
def test_docstrings_are_read_by_the_site_and_by_help(name):
    """An example that doctest runs, an entry for each argument, and mathematics without markup."""
    text = inspect.getdoc(getattr(jxent, name))
    sections = dict(re.findall(r"^(\w+):\n((?:  .*\n|\n)+)", text + "\n", re.MULTILINE))
    assert f"jxent.{name}(" in sections["Examples"] or name in ("Stats", "ClassLogProbs")
    assert ">>> " in sections["Examples"]
    assert ":math:" not in text
    if name in FUNCTIONS:
        entries = re.findall(r"^  (\w+): ", sections["Args"], re.MULTILINE)
        assert entries == [*inspect.signature(getattr(jxent, name)).parameters]
        # What comes before a colon would be taken as a type.
        assert ":" not in sections["Returns"].splitlines()[0]


def test_without_a_place_for_the_rules_of_checkify():
    """Nothing is reported, and all else is as ever."""
    program = """
import jax.numpy as jnp
from jax.experimental import checkify
from jax._src import checkify as private
rules = private.error_checks
del private.error_checks
import jxent
private.error_checks = rules
error, loss = checkify.checkify(jxent.cross_entropy)(jnp.zeros((2, 3)), jnp.array([0, 3]))
assert error.get() is None and jnp.isnan(loss)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


BELOW = {  # what each part of the package may import besides itself; the public modules, nothing of each other
    "_core": set(),
    "_backend": {"_core"},
    "_rows": {"_core", "_backend"},
    "_labels": {"_core", "_backend", "_rows"},
    "_objective": {"_core", "_backend", "_rows", "_labels"},
    "_sweep": {"_core", "_backend", "_rows", "_labels", "_objective"},
    "_mesh": {"_core", "_backend", "_rows", "_labels", "_objective", "_sweep"},
    "_linear_rules": {"_core", "_rows", "_sweep", "_mesh"},
    "_call": {"_core", "_rows", "_labels", "_objective"},
    "_linear_loss": {"_core", "_rows", "_sweep", "_linear_rules", "_call"},
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(source):
    """As docs/project/design.md says; `jxent/__init__.py` alone imports the public modules."""
    part = source.relative_to(PACKAGE).parts[0].removesuffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    imported = {module.split(".")[1] for module in modules if module.startswith("jxent.")}
    assert part == "__init__" or imported <= BELOW.get(part, set(BELOW)) | {part}


def test_every_file_of_tests_is_listed():
    """docs/project/design.md says what each one guarantees."""
    tests = pathlib.Path(__file__).parent
    text = (tests.parent / "docs" / "project" / "design.md").read_text(encoding="utf-8")
    table = text.partition("## Which tests hold what\n")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`(test_\w+)`", table))
    there = {path.stem for path in tests.glob("test_*.py")}
    if (tests.parent / "PKG-INFO").exists():  # in the source archive, which lacks some
        project = tomllib.loads((tests.parent / "pyproject.toml").read_text(encoding="utf-8"))
        left_out = project["tool"]["hatch"]["build"]["targets"]["sdist"]["exclude"]
        there |= {pathlib.Path(path).stem for path in left_out if path.startswith("/tests/test_")}
    assert listed == there


def test_import_touches_no_device():
    """How many devices a CPU has can be set after the import, which JAX refuses once it has looked for devices."""
    program = "import jax, jxent; jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["3"], out.stderr


ONES, LABELS = np.ones((2, 3), np.float32), np.ones(2, np.int32)
CALLS = {
    "js_divergence": (ONES, ONES),
    "kl_divergence": (ONES, ONES),
    "linear_tv_distance": (ONES, ONES.T, ONES, ONES.T),
    "tv_distance": (ONES, ONES),
    "linear_js_divergence": (ONES, ONES.T, ONES, ONES.T),
    "linear_kl_divergence": (ONES, ONES.T, ONES, ONES.T),
    "cross_entropy": (ONES, LABELS),
    "linear_cross_entropy": (ONES, ONES.T, LABELS),
    "linear_log_probs": (ONES, ONES.T, LABELS[:, None]),
    "linear_top_k": (ONES, ONES.T, 2),
    "linear_sigmoid_cross_entropy": (ONES, ONES.T, LABELS),
    "log_softmax": (ONES,),
    "logsumexp": (ONES,),
    "next_token_labels": (LABELS,),
    "nll_loss": (ONES, LABELS),
    "sigmoid_cross_entropy": (ONES, ONES),
    "softmax": (ONES,),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_one_program(name):
    """Compiled as a whole, outside `jit` too."""
    static = [i for i, argument in enumerate(CALLS[name]) if isinstance(argument, int)]
    equations = jax.make_jaxpr(getattr(jxent, name), static)(*CALLS[name]).eqns
    assert [equation.primitive.name for equation in equations] == ["jit"]


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (jxent.cross_entropy, annotations.LogitsLossOptions),
        (jxent.linear_cross_entropy, annotations.LinearLossOptions),
    ],
)
def test_overloads_take_the_options_of_the_signature(function, options):
    parameters = inspect.signature(function).parameters
    by_name = {name: p.annotation for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert by_name.pop("return_stats") == "bool"
    assert {name: hint.__forward_arg__ for name, hint in options.__annotations__.items()} == by_name
