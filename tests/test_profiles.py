"""Names in profiles, logs of compilation and jaxprs: that of the public function, and those of the parts of a sweep."""

import ast
import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jxent

RNG = np.random.default_rng(29)
# Sizes that no other test has, or the log would lack what is compiled already.
LOGITS, LABELS = RNG.normal(size=(2, 14, 43)).astype(np.float32), RNG.integers(0, 43, (2, 14), np.int32)
HIDDEN, KERNEL = RNG.normal(size=(2, 14, 3)).astype(np.float32), RNG.normal(size=(3, 43)).astype(np.float32)
BIAS = np.zeros(43, np.float32)
ARRAYS = {
    "cross_entropy": (LOGITS, LABELS),
    "nll_loss": (LOGITS, LABELS),
    "sigmoid_cross_entropy": (LOGITS, 1 / (1 + LOGITS**2)),
    "next_token_labels": (LABELS,),
    "linear_cross_entropy": (HIDDEN, KERNEL, LABELS),
    "linear_sigmoid_cross_entropy": (HIDDEN, KERNEL, LABELS),
}
ARRAYS |= {"linear_log_probs": (HIDDEN, KERNEL, LABELS[..., None]), "linear_top_k": (HIDDEN, KERNEL, 2)}
ARRAYS |= dict.fromkeys(("logsumexp", "softmax", "log_softmax"), (LOGITS,))
ARRAYS |= dict.fromkeys(("kl_divergence", "js_divergence", "tv_distance"), (LOGITS, -LOGITS))
LINEAR_DIVERGENCES = ("linear_kl_divergence", "linear_js_divergence", "linear_tv_distance")
ARRAYS |= dict.fromkeys(LINEAR_DIVERGENCES, (HIDDEN, KERNEL, -HIDDEN, KERNEL))
FUNCTIONS = sorted(name for name in jxent.__all__ if name.islower())


def private_names():
    sources = pathlib.Path(jxent.__file__).parent.rglob("*.py")
    nodes = (node for source in sources for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
    # JAX 0.12 shows also the jit of a block.
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)} - {*FUNCTIONS, "one_block"} | {"<lambda>"}


PRIVATE = private_names()


def call(name, *arrays, **options):
    blocks = {"block_size": 4} if name.startswith("linear") else {}
    return getattr(jxent, name)(*arrays, **blocks, **options)


def total(name, *arrays, **options):
    out = call(name, *arrays, **options)
    return jnp.sum(out.log_probs) if isinstance(out, jxent.ClassLogProbs) else jnp.sum(out)


def scopes(text):
    """The parts of the names of operations, of a lowered or a compiled program."""
    names = re.findall(r'(?:loc\(|op_name=)"([^"]*)"', text)
    return {re.sub(r"jvp|transpose|[()]", "", part) for name in names for part in name.split("/")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_log_of_compilation(name, caplog):
    """It has one program, of the public function's name; and nothing where the same is called again."""
    arrays = [array if isinstance(array, int) else jnp.asarray(array) for array in ARRAYS[name]]
    function = partial(call, name)
    gradient = function if name == "next_token_labels" else jax.grad(partial(total, name))

    def logged(*functions):
        caplog.clear()
        with jax.log_compiles():
            for each in functions:
                each(*arrays)
        return {m[1] for r in caplog.records if (m := re.search(r"(?:tracing |Compiling jit\()([\w<>]+)", r.message))}

    assert logged(function) == {name}
    assert not logged(gradient) & PRIVATE
    assert logged(function, gradient) == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jaxpr_and_lowered_program(name):
    def train_step(*arrays):
        out = call(name, *arrays)
        return out if name == "next_token_labels" else jax.grad(partial(total, name))(*arrays)

    static = [i for i, array in enumerate(ARRAYS[name]) if isinstance(array, int)]
    jaxpr = str(jax.make_jaxpr(train_step, static)(*ARRAYS[name]))
    of_jaxpr = set(re.findall(r"\bjit\[\s*name=(\w+)", jaxpr))
    text = jax.jit(train_step, static_argnums=static).lower(*ARRAYS[name]).as_text(debug_info=True)
    of_program = set(re.findall(r"jit\((\w+)\)", text))
    assert name in of_jaxpr & of_program
    assert "train_step" in of_program
    assert not (of_jaxpr | of_program) & PRIVATE


PARTS = {"logits", "rows", "logits_gradient", "hidden_gradient", "kernel_gradient", "bias_gradient", "sum_over_blocks"}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_parts_of_a_sweep(reduction):
    """Each matmul has a name of its own, and so have the rows and the gradient of the logits."""

    def f(hidden, kernel, bias):
        return total("linear_cross_entropy", hidden, kernel, LABELS, bias=bias, reduction=reduction)

    text = jax.jit(jax.grad(f, (0, 1, 2))).lower(HIDDEN, KERNEL, BIAS).as_text(debug_info=True)
    assert {"linear_cross_entropy", *PARTS} <= scopes(text)
    matmuls = {part for part in scopes(text) if any(f"{part}/dot_general" in line for line in text.splitlines())}
    assert {"logits", "hidden_gradient", "kernel_gradient"} <= matmuls


def test_parts_of_a_divergence():
    f = jax.jit(jax.grad(partial(total, "linear_kl_divergence"), (0, 1, 2, 3)))
    text = f.lower(HIDDEN, KERNEL, -HIDDEN, KERNEL).as_text(debug_info=True)
    both = {"hidden_gradient", "kernel_gradient", "logits"}
    assert {"linear_kl_divergence", *both, "hidden_p_gradient", "kernel_p_gradient", "logits_p"} <= scopes(text)


@pytest.mark.parametrize("mode", ["Auto", "Explicit", "named"])
def test_on_a_mesh(mode):
    """The compiler asks for the sweep of a device by itself, where axes are `Auto`: that has the names too."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType[mode.replace("named", "Auto")],) * 2)
    names = {"axis_name": "model", "batch_axis_name": "data"} if mode == "named" else {}

    def train_step(hidden, kernel, labels):
        return jax.grad(partial(total, "linear_cross_entropy", **names), (0, 1))(hidden, kernel, labels)

    specs = P("data"), P(None, "model"), P("data")
    shapes = [
        jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))
        for array, spec in zip((HIDDEN, KERNEL[:, :42], LABELS), specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        text = jax.jit(train_step).lower(*shapes).compile().as_text()
    matmuls = re.findall(r' dot\(.*op_name="([^"]*)"', text)
    assert len(matmuls) >= 3
    parts = {"logits", "hidden_gradient", "kernel_gradient"}
    assert all("linear_cross_entropy" in scope and parts & {*scope.split("/")} for scope in matmuls)
    assert not set(re.findall(r"jit\((\w+)\)", text)) & PRIVATE
