"""Forward mode of every public function, alone, in all orders of the modes, and under JAX's transformations.

Judged by what JAX makes of the plain formulas of reference.py, in float64. The calls are those of test_transformations,
and of the linear loss besides. `test_exactness` judges the rounding of tangents and second derivatives in float32.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiling import optimized
from grids import short
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads
from test_transformations import CASES, FUNCTIONS, SIZE, assert_close, direction, inputs, scalar

import jxent

FEATURES = 3
RNG = np.random.default_rng(17)
HIDDEN, KERNEL = RNG.normal(size=(3, 2, FEATURES)), RNG.normal(size=(FEATURES, 5))
BIAS = RNG.normal(size=5)
LINEAR = {  # the options of the logits' case, and those of the linear loss
    "linear-index": ("cross_entropy-index", {}),
    "linear-none": ("cross_entropy-smooth-index", {"reduction": "none"}),
    "linear-smooth-probability": ("cross_entropy-smooth-probability", {}),
    "linear-recompute": ("cross_entropy-smooth-index", {"recompute": True, "vocab_axis": 0}),
    "linear-softcap": ("cross_entropy-softcap", {"vocab_axis": 0}),
    "linear-stats": ("cross_entropy-stats", {"reduction": "none"}),
}
ALL = (*CASES, *LINEAR)
SOME = (*FUNCTIONS, "linear-smooth-probability", "linear-none")
THIRD = ("log_softmax", "cross_entropy-smooth-probability", "linear-softcap")


def linear(module, name, arrays):
    """The linear loss, or the formula of it."""
    case, options = LINEAR[name]
    arrays = dict(arrays)
    hidden, kernel, bias, labels = (arrays.pop(key) for key in ("hidden", "kernel", "bias", "labels"))
    options = CASES[case].options | options
    if module is reference:
        options = {key: options[key] for key in options if key not in ("recompute", "vocab_axis")}
        out = reference.cross_entropy(hidden @ kernel + bias, labels, **arrays, **options)
    else:
        kernel = kernel.T if options.get("vocab_axis") == 0 else kernel
        out = jxent.linear_cross_entropy(hidden, kernel, labels, bias=bias, block_size=2, **arrays, **options)
    out = out[0] if isinstance(out, tuple) else out
    return jnp.vdot(jnp.cos(jnp.arange(out.size, dtype=out.dtype)), out.ravel())


def function_of(name):
    """(a scalar function of one float64 vector, that of the plain formula, the vector)."""
    if name in CASES:
        floats, rest = inputs(name, jnp.float64)
        ours, theirs = partial(scalar, name), partial(scalar, name, module=reference)
    else:
        floats, rest = inputs(LINEAR[name][0], jnp.float64)
        floats = {key: array for key, array in floats.items() if key != "scores"}
        floats |= {"hidden": jnp.asarray(HIDDEN), "kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(BIAS)}
        ours, theirs = (
            lambda floats, rest, module=module: linear(module, name, floats | rest) for module in (jxent, reference)
        )
    vector, unravel = ravel_pytree(floats)
    return (*(lambda vector, f=f: f(unravel(vector), rest) for f in (ours, theirs)), vector)


# --- orders of the modes ----------------------------------------------------------------------------------------------


def derivatives(f, order):
    """A function of (at, v): the derivatives of that order along v, by the order of modes, that of the outermost first.

    An outermost reverse mode has the gradient of the derivative of one order less.
    """

    def of_modes(modes, at, v):
        inner = f
        for mode in reversed(modes[1:]):
            inner = partial(forwards, inner, v=v) if mode == "f" else partial(backwards, inner, v=v)
        return forwards(inner, at, v) if modes[0] == "f" else jax.grad(inner)(at)

    def forwards(f, at, v):
        return jax.jvp(f, (at,), (v,))[1]

    def backwards(f, at, v):
        return jnp.vdot(jax.grad(f)(at), v)

    modes = ["".join(modes) for modes in itertools.product("fr", repeat=order)]
    return jax.jit(lambda at, v: {mode: of_modes(mode, at, v) for mode in modes})


@pytest.mark.parametrize(
    ("name", "order"),
    short(
        [*((name, order) for name in ALL for order in (1, 2)), *((name, 3) for name in THIRD)],
        # The second order differentiates the first, and other tests see the first of these.
        *((name, 2) for name in FUNCTIONS),
        *(("linear-smooth-probability", 1), ("linear-none", 2)),
    ),
)
def test_orders_of_the_modes(name, order, x64):
    ours, theirs, at = function_of(name)
    v = direction(at)
    wanted = derivatives(theirs, order)(at, v)
    for mode, got in derivatives(ours, order)(at, v).items():
        want = wanted["f" * order if mode[0] == "f" else "r" + "f" * (order - 1)]
        assert np.any(np.asarray(want)), mode
        assert_close(got, want, ulps=32 * 4**order * SIZE)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*SOME, "cross_entropy-softcap", "linear-softcap"])
def test_against_differences(name, x64):
    """JAX's own judge, which takes differences of what it judges."""
    f, _, at = function_of(name)
    check_grads(jax.jit(f), (at,), order=3, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


LOSSES = {  # of (scores, labels, options)
    "cross_entropy": lambda scores, labels, **options: jxent.cross_entropy(
        scores, labels, label_smoothing=0.1, **options
    ),
    "nll_loss": jxent.nll_loss,
    "linear": lambda scores, labels, **options: jxent.linear_cross_entropy(
        scores, jnp.cos(jnp.arange(20.0)).reshape(5, 4), labels, block_size=2, **options
    ),
}


@pytest.mark.covering("linear-probability")
@pytest.mark.parametrize("labels", ["index", "probability"])
@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_count_is_in_no_derivative(name, labels, x64):
    """Positions that are left out hold NaN; every derivative is as if they held 0. Their tangents may be NaN too."""
    scores, v = -jnp.exp(jnp.sin(jnp.arange(30.0))).reshape(6, 5), jnp.cos(jnp.arange(30.0)).reshape(6, 5)
    counts = jnp.array([True, False, True, True, False, True])
    classes = 4 if name == "linear" else 5
    given = jnp.arange(6) % classes if labels == "index" else jax.nn.softmax(scores[:, :classes])

    def filled(array, value):
        return jnp.where(counts[:, None], array, value) if array.ndim == 2 else array

    def loss(value, scores):
        return LOSSES[name](scores, filled(given, value), where=counts)

    @partial(jax.jit, static_argnums=0)
    def of_order(order, value, v):
        return derivatives(partial(loss, value), order)(filled(scores, value), v)

    for order in (1, 2):
        wanted = of_order(order, 0.0, v)
        for mode, got in of_order(order, jnp.nan, v).items():
            assert np.all(np.isfinite(got)), mode
            np.testing.assert_array_equal(got, wanted[mode], err_msg=mode)
    moved = of_order(1, jnp.nan, filled(v, jnp.nan))["f"]
    np.testing.assert_array_equal(moved, of_order(1, 0.0, v)["f"])


# --- JAX's transformations --------------------------------------------------------------------------------------------


def pushed(f, at, v):
    """(the value, its derivative along v)."""
    return jax.jvp(f, (at,), (v,))


@pytest.mark.parametrize("name", short(SOME, "log_softmax", "cross_entropy-smooth-probability", "linear-none"))
def test_under_transformations(name, x64):
    """Eager, `jit`, `vmap` of `jvp` and `jvp` of `vmap`, `checkpoint`, `linearize`, `scan`: all give one answer."""
    f, theirs, at = function_of(name)
    v = direction(at)
    want = jax.jit(partial(pushed, theirs))(at, v)

    def scanned(at):
        return jax.lax.scan(lambda total, scale: (total + f(scale * at), None), 0.0, jnp.ones(2))[0] / 2

    def of_two(points, directions):
        return jax.vmap(partial(pushed, f))(points, directions)

    ways = {
        "eager": pushed(f, at, v),
        "jit": jax.jit(partial(pushed, f))(at, v),
        "jvp of jit": pushed(jax.jit(f), at, v),
        "linearize": (lambda value, move: (value, move(v)))(*jax.linearize(jax.jit(f), at)),
        "checkpoint": jax.jit(partial(pushed, jax.checkpoint(f)))(at, v),
        "scan": jax.jit(partial(pushed, scanned))(at, v),
    }
    want = tuple(map(jnp.asarray, want))
    assert_close(ways, dict.fromkeys(ways, want), ulps=64 * SIZE)

    points, directions = jnp.stack([at, at + 0.1 * v]), jnp.stack([v, jnp.cos(v)])
    wanted = jax.jit(jax.vmap(partial(pushed, theirs)))(points, directions)
    assert_close(jax.jit(of_two)(points, directions), wanted, ulps=64 * SIZE)
    assert_close(jax.jit(partial(pushed, jax.vmap(f)))(points, directions), wanted, ulps=64 * SIZE)
    # Two directions at one point, as `jacfwd` takes them: of the residuals nothing is mapped.
    along_both = jax.jit(jax.vmap(lambda v: pushed(f, at, v)[1]))(directions)
    wanted = jax.jit(jax.vmap(lambda v: pushed(theirs, at, v)[1]))(directions)
    assert_close(along_both, wanted, ulps=64 * SIZE)


@pytest.mark.parametrize("name", short(SOME, "softmax", "nll_loss-index", "cross_entropy-smooth-probability"))
def test_gradient_of_a_derivative_that_examples_share(name, x64):
    """What is not mapped has the sum of the examples' gradients, in whatever order `vmap` and the modes come."""
    ours, theirs, at = function_of(name)
    scales = jnp.array([1.0, -0.5, 2.0])

    def objective(f, at):
        return jnp.sum(jax.vmap(lambda scale: jax.jvp(f, (at,), (scale * jnp.cos(at),))[1])(scales))

    def of_directions(f, v):
        """Linear in v, which all examples share; the points are mapped."""
        return jnp.sum(jax.vmap(lambda scale: jax.jvp(f, (scale * at,), (v,))[1])(scales))

    for of in (objective, of_directions):
        got, want = (jax.jit(jax.grad(partial(of, f)))(at) for f in (ours, theirs))
        assert_close(got, want, ulps=256 * SIZE)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_does_not_move_has_no_matmul(reduction):
    """One for the loss; besides that, the logits once more, and a matmul for each of the two that moves."""
    hidden, kernel, labels = jnp.ones((64, 32)), jnp.ones((32, 128)), jnp.arange(64)

    def loss(hidden, kernel):
        return jxent.linear_cross_entropy(hidden, kernel, labels, block_size=16, reduction=reduction)

    def of_hidden(hidden, kernel, to_hidden, to_kernel):
        return jax.jvp(lambda hidden: loss(hidden, kernel), (hidden,), (to_hidden,))

    def of_both(hidden, kernel, *directions):
        return jax.jvp(loss, (hidden, kernel), directions)

    programs = [optimized(f).lower(hidden, kernel, hidden, kernel).compile().as_text() for f in (of_hidden, of_both)]
    assert [program.count(" dot(") for program in programs] == [3, 4]


def test_next_kinds_of_rules():
    """Flags of JAX's newest release (`upgrade` in its `config.py`), of which each announces the next default."""
    hidden, kernel, labels = jnp.ones((8, 4)), jnp.ones((4, 6)), jnp.arange(8) % 6

    def loss(hidden, kernel):
        return jxent.linear_cross_entropy(hidden, kernel, labels, block_size=4)

    def derivatives():
        at = hidden, kernel
        return jax.grad(loss)(*at), jax.jvp(loss, at, at), jax.jit(lambda *at: jax.jvp(jax.grad(loss), at, at))(*at)

    want = derivatives()
    for flag in ("jax_custom_jvp3", "jax_custom_vjp3", "jax_remat3"):
        if jax.__version_info__ >= (0, 12):  # before, `custom_partitioning` of JAX itself did not take them
            jax.config.update(flag, True)
            try:
                jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, err_msg=flag), derivatives(), want)
            finally:
                jax.config.update(flag, False)
