"""Every public function under every transformation of JAX: jit to export, first and second derivatives.

Losses and gradients under a transformation are compared with those of the plain call, second derivatives with what JAX
makes of the plain formulas of reference.py, in float64. Tolerances are in units of the rounding of the largest
number compared; what they allow for is sums of up to `SIZE` terms taken in another order.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from grids import short
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

import jxent

EXAMPLES, POSITIONS, CLASSES = 3, 2, 5
SIZE = EXAMPLES * POSITIONS * CLASSES

# --- the calls --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A call: `scores` and these arrays, of which `class_weight` alone has no leading axis of examples."""

    function: Callable
    options: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def is_loss(self):
        return self.function in (jxent.nll_loss, jxent.cross_entropy)


RNG = np.random.default_rng(7)
SHAPE = (EXAMPLES, POSITIONS, CLASSES)
SCORES = 2 * RNG.normal(size=SHAPE)
PROBABILITIES = RNG.dirichlet(np.ones(CLASSES), SHAPE[:-1])
INDICES = np.array([[4, 0], [1, -100], [2, 2]], np.int32)
CLASS_WEIGHT = RNG.uniform(0.5, 2, CLASSES)
SAMPLE_WEIGHT = RNG.uniform(0.5, 2, SHAPE[:-1])
WHERE = np.array([[True, True], [True, True], [False, True]])
CLASSES_WHERE = RNG.permuted(np.tile([True, True, True, False, False], (*SHAPE[:-1], 1)), axis=-1)

INDEX = {"labels": INDICES}
PROBABILITY = {"labels": PROBABILITIES}
WEIGHTS = {"class_weight": CLASS_WEIGHT, "sample_weight": SAMPLE_WEIGHT, "where": WHERE}
SMOOTH = {"label_smoothing": 0.1, "z_loss_weight": 0.05}

CASES = {
    "logsumexp": Case(jxent.logsumexp, {}, {"where": CLASSES_WHERE}),
    "softmax": Case(jxent.softmax, {}, {"where": CLASSES_WHERE}),
    "log_softmax": Case(jxent.log_softmax, {}, {}),
    "nll_loss-index": Case(jxent.nll_loss, {}, INDEX | WEIGHTS),
    "nll_loss-probability": Case(jxent.nll_loss, {}, PROBABILITY | WEIGHTS),
    "cross_entropy-index": Case(jxent.cross_entropy, {}, INDEX),
    "cross_entropy-probability": Case(jxent.cross_entropy, {}, PROBABILITY),
    "cross_entropy-smooth-index": Case(jxent.cross_entropy, SMOOTH, INDEX | WEIGHTS),
    "cross_entropy-smooth-probability": Case(jxent.cross_entropy, SMOOTH, PROBABILITY | WEIGHTS),
    "cross_entropy-softcap": Case(jxent.cross_entropy, {"logit_softcap": 3.0, "z_loss_weight": 0.05}, INDEX),
    "cross_entropy-stats": Case(jxent.cross_entropy, {"return_stats": True}, INDEX | {"where": WHERE}),
}
LOSSES = [name for name, case in CASES.items() if case.is_loss]
FUNCTIONS = ("logsumexp", "softmax", "log_softmax", "nll_loss-index", "cross_entropy-smooth-probability")
each_case = pytest.mark.parametrize(
    "name", short(CASES, *FUNCTIONS, *(f"cross_entropy-{kind}" for kind in ("smooth-index", "softcap", "stats")))
)
each_function = pytest.mark.parametrize("name", short(CASES, *FUNCTIONS))  # and --exhaustive each case
each_loss = pytest.mark.parametrize("name", short(LOSSES, *FUNCTIONS))


def in_dtype(array, dtype):
    array = jnp.asarray(array)
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def inputs(name, dtype=jnp.float32):
    """The call's arrays in two dictionaries: floating point, which have gradients, and the rest."""
    arrays = {"scores": SCORES} | CASES[name].arrays
    arrays = {k: in_dtype(a, dtype) for k, a in arrays.items()}
    floats = {k: a for k, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    return floats, {k: a for k, a in arrays.items() if k not in floats}


def call(name, arrays, module=jxent, **options):
    """The public function's answer, or that of its namesake in another module."""
    case, arrays = CASES[name], dict(arrays)
    first = [arrays.pop(k) for k in ("scores", "labels") if k in arrays]
    return getattr(module, case.function.__name__)(*first, **arrays, **case.options | options)


def loss_of(out):
    return out[0] if isinstance(out, tuple) else out


def scalar(name, floats, rest, module=jxent):
    """The loss; of a softmax function a sum with coefficients that differ from each other."""
    out = loss_of(call(name, floats | rest, module))
    return jnp.vdot(jnp.cos(jnp.arange(out.size, dtype=out.dtype)), out.ravel())


plain_scalar = partial(scalar, module=reference)


def rows(name, arrays):
    """The answer without the reduction: an array whose leading axes are those of the examples and positions."""
    return loss_of(call(name, arrays, **({"reduction": "none"} if CASES[name].is_loss else {})))


def assert_close(actual, expected, ulps):
    """Trees whose leaves agree to `ulps` of the largest number of each leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        scale = np.abs(b).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=ulps * np.finfo(a.dtype).eps * scale)


def assert_gradients_matter(gradients):
    """Each of them has a number in it: two gradients of 0 would agree too."""
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(gradients))


# --- jit, grad --------------------------------------------------------------------------------------------------------


@each_function
def test_jit(name):
    floats, rest = inputs(name)
    eager = jax.value_and_grad(partial(scalar, name))
    assert_gradients_matter(eager(floats, rest)[1])
    assert_close(jax.jit(eager)(floats, rest), eager(floats, rest), ulps=8)


@each_function
def test_grad_and_value_and_grad(name):
    floats, rest = inputs(name)
    f = partial(scalar, name)
    value, gradient = jax.value_and_grad(f)(floats, rest)
    assert_close(value, f(floats, rest), ulps=2)
    assert_close(jax.grad(f)(floats, rest), gradient, ulps=2)


@each_function
def test_first_derivatives_are_those_of_the_formula(name, x64):
    floats, rest = inputs(name, jnp.float64)
    actual = jax.jit(jax.value_and_grad(partial(scalar, name)))(floats, rest)
    assert_close(actual, jax.jit(jax.value_and_grad(partial(plain_scalar, name)))(floats, rest), ulps=4 * SIZE)


@each_loss
def test_jacrev_of_each_position(name):
    """The Jacobian of the rows is block diagonal: its sum is the gradient of their sum, and no row reads another."""
    floats, rest = inputs(name)
    scores = floats.pop("scores")
    jacobian = jax.jit(jax.jacrev(lambda scores: rows(name, floats | rest | {"scores": scores})))(scores)
    gradient = jax.grad(lambda scores: rows(name, floats | rest | {"scores": scores}).sum())(scores)
    jacobian = np.asarray(jacobian).reshape(EXAMPLES * POSITIONS, EXAMPLES * POSITIONS, CLASSES)
    own = np.arange(EXAMPLES * POSITIONS)
    assert_close(jacobian[own, own].reshape(SHAPE), gradient, ulps=8)
    assert not np.delete(jacobian.reshape(-1, CLASSES), own * (len(own) + 1), 0).any()


# --- vmap -------------------------------------------------------------------------------------------------------------


def split_examples(name, dtype=jnp.float32):
    """(arrays with a leading axis of examples, arrays that examples share)."""
    floats, rest = inputs(name, dtype)
    arrays = floats | rest
    shared = {k: arrays.pop(k) for k in ("class_weight",) if k in arrays}
    return arrays, shared


def example(arrays, i):
    return jax.tree.map(lambda a: a[i], arrays)


@each_function
def test_vmap_over_examples(name):
    arrays, shared = split_examples(name)
    mapped = jax.vmap(lambda example: rows(name, example | shared))(arrays)
    assert_close(mapped, rows(name, arrays | shared), ulps=4)


@each_function
def test_vmap_over_positions(name):
    """Down to unbatched (classes,) scores with a scalar label."""
    arrays, shared = split_examples(name)
    mapped = jax.vmap(jax.vmap(lambda position: rows(name, position | shared)))(arrays)
    assert_close(mapped, rows(name, arrays | shared), ulps=4)


@pytest.mark.parametrize("function", [jxent.nll_loss, jxent.cross_entropy])
def test_vmap_over_the_last_axis(function):
    """The axis is counted without the mapped one."""
    scores, labels = jnp.asarray(np.moveaxis(SCORES[:, 0], 0, -1)), jnp.asarray(INDICES[:, 0])
    mapped = jax.vmap(partial(function, axis=0), in_axes=(-1, 0))(scores, labels)
    assert_close(mapped, function(scores.T, labels, reduction="none"), ulps=4)


@each_loss
def test_vmap_of_the_mean_over_examples(name):
    """Each example has its own denominator."""
    arrays, shared = split_examples(name)
    mapped = jax.vmap(lambda example: loss_of(call(name, example | shared)))(arrays)
    looped = [loss_of(call(name, example(arrays, i) | shared)) for i in range(EXAMPLES)]
    assert_close(mapped, jnp.stack(looped), ulps=4)


@each_function
def test_gradients_per_example(name):
    arrays, shared = split_examples(name)
    scores = arrays.pop("scores")

    def gradient(scores, example):
        return jax.grad(lambda scores: scalar(name, {"scores": scores}, example | shared))(scores)

    mapped = jax.jit(jax.vmap(gradient))(scores, arrays)
    compiled = jax.jit(gradient)
    looped = [compiled(scores[i], example(arrays, i)) for i in range(EXAMPLES)]
    assert_gradients_matter(looped)
    assert_close(mapped, jnp.stack(looped), ulps=8)


@pytest.mark.parametrize("name", [name for name in LOSSES if "class_weight" in CASES[name].arrays])
def test_vmap_over_class_weights(name):
    floats, rest = inputs(name)
    candidates = jnp.asarray(RNG.uniform(0.5, 2, (4, CLASSES)), jnp.float32)
    run = jax.jit(jax.value_and_grad(lambda weight: scalar(name, floats | {"class_weight": weight}, rest)))
    mapped = jax.vmap(run)(candidates)
    losses, gradients = zip(*(run(candidate) for candidate in candidates), strict=True)
    assert_gradients_matter(gradients)
    assert_close(mapped, (jnp.stack(losses), jnp.stack(gradients)), ulps=8)


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss_weight"])
def test_vmap_over_scalar_options(option):
    values = jnp.array([0.0, 0.1, 0.3])
    loss = partial(jxent.cross_entropy, jnp.asarray(SCORES), jnp.asarray(INDICES))
    mapped = jax.vmap(lambda value: loss(**{option: value}))(values)
    assert_close(mapped, jnp.stack([loss(**{option: float(value)}) for value in values]), ulps=8)


# --- second derivatives -----------------------------------------------------------------------------------------------


def flat(name, of):
    """`of` (`scalar` or `plain_scalar`) as a function of one float64 vector, all floating-point arrays, and a point."""
    floats, rest = inputs(name, jnp.float64)
    vector, unravel = ravel_pytree(floats)
    return lambda vector: of(name, unravel(vector), rest), vector


def direction(vector):
    return jnp.asarray(np.random.default_rng(11).normal(size=vector.shape))


@each_function
def test_hessian(name, x64):
    """With respect to all floating-point arrays at once, mixed derivatives included."""
    f, at = flat(name, scalar)
    expected = jax.jit(jax.hessian(flat(name, plain_scalar)[0]))(at)
    assert_gradients_matter(expected)
    assert_close(jax.jit(jax.hessian(f))(at), expected, ulps=16 * SIZE)


@each_case
def test_forward_over_reverse(name, x64):
    """A Hessian-vector product by jvp of value_and_grad; the value's tangent is the derivative along the vector."""
    f, at = flat(name, scalar)
    v = direction(at)
    reference = flat(name, plain_scalar)[0]
    run = [jax.jit(lambda at, f=f: jax.jvp(jax.value_and_grad(f), (at,), (v,))) for f in (f, reference)]
    (_, gradient), (along, product) = run[0](at)
    assert_close((along, product), run[1](at)[1], ulps=16 * SIZE)
    assert_close(along, gradient @ v, ulps=16 * SIZE)


@each_function
def test_reverse_over_reverse(name, x64):
    """The gradient of the loss plus its squared gradient's norm, a gradient penalty."""

    def penalized(f):
        def objective(at):
            value, gradient = jax.value_and_grad(f)(at)
            return value + gradient @ gradient

        return jax.jit(jax.value_and_grad(objective))

    (f, at), (reference, _) = flat(name, scalar), flat(name, plain_scalar)
    assert_close(penalized(f)(at), penalized(reference)(at), ulps=32 * SIZE)


@pytest.mark.parametrize("name", ["log_softmax", "cross_entropy-index", "cross_entropy-smooth-probability"])
def test_hessian_vector_product_of_each_example(name, x64):
    """vmap of jvp of grad, the innermost of K-FAC, sharpness and influence functions."""
    arrays, shared = split_examples(name, jnp.float64)
    scores = arrays.pop("scores")
    v = direction(scores)

    def product(of, scores, example, v):
        gradient = jax.grad(lambda scores: of(name, {"scores": scores}, example | shared))
        return jax.jvp(gradient, (scores,), (v,))[1]

    actual = jax.jit(jax.vmap(partial(product, scalar)))(scores, arrays, v)
    expected = jax.jit(jax.vmap(partial(product, plain_scalar)))(scores, arrays, v)
    assert_close(actual, expected, ulps=16 * SIZE)


# --- checkpoint and loops ---------------------------------------------------------------------------------------------


@each_function
def test_checkpoint(name):
    floats, rest = inputs(name)
    f = partial(scalar, name)
    expected = jax.value_and_grad(f)(floats, rest)
    assert_close(jax.jit(jax.value_and_grad(jax.checkpoint(f)))(floats, rest), expected, ulps=8)


@each_function
def test_scan_over_examples(name):
    """Losses accumulated over micro-batches, and the gradient of their sum."""
    arrays, shared = split_examples(name)
    scores = arrays.pop("scores")

    def accumulated(scores):
        def step(total, batch):
            scores, example = batch
            return total + scalar(name, {"scores": scores}, example | shared), None

        return jax.lax.scan(step, jnp.float32(0), (scores, arrays))[0]

    def summed(scores):
        return jax.vmap(lambda scores, example: scalar(name, {"scores": scores}, example | shared))(
            scores, arrays
        ).sum()

    expected = jax.value_and_grad(summed)(scores)
    assert_gradients_matter(expected)
    assert_close(jax.jit(jax.value_and_grad(accumulated))(scores), expected, ulps=8)


@each_function
def test_map_over_examples(name):
    arrays, shared = split_examples(name)
    mapped = jax.lax.map(lambda example: rows(name, example | shared), arrays)
    assert_close(mapped, rows(name, arrays | shared), ulps=4)


# --- compiled ahead, and elsewhere ------------------------------------------------------------------------------------


@each_function
def test_ahead_of_time(name):
    floats, rest = inputs(name)
    f = jax.value_and_grad(partial(scalar, name))
    compiled = jax.jit(f).lower(*jax.eval_shape(lambda *x: x, floats, rest)).compile()
    assert_close(compiled(floats, rest), f(floats, rest), ulps=8)


@each_function
def test_export(name):
    """One module for four platforms, run here on the CPU."""
    floats, rest = inputs(name)
    f = jax.jit(jax.value_and_grad(partial(scalar, name)))
    exported = jax.export.export(f, platforms=["cpu", "cuda", "rocm", "tpu"])(floats, rest)
    assert_close(exported.call(floats, rest), f(floats, rest), ulps=8)


@pytest.mark.parametrize("name", short(CASES, "cross_entropy-smooth-probability"))  # test_export.py has each function
def test_export_by_bytes(name):
    """Serialized and read again; the gradient is exported along, and what is read can be differentiated."""
    floats, rest = inputs(name)
    f = jax.jit(partial(scalar, name))
    data = jax.export.export(f, platforms=["cpu", "cuda", "rocm", "tpu"])(floats, rest).serialize(vjp_order=1)
    read = jax.export.deserialize(data)
    assert_close(jax.value_and_grad(read.call)(floats, rest), jax.value_and_grad(f)(floats, rest), ulps=8)


@pytest.mark.parametrize("name", ["log_softmax", "nll_loss-index", "cross_entropy-index", "cross_entropy-probability"])
def test_export_for_any_batch_size(name):
    """Shapes with a symbol in them."""
    floats, rest = inputs(name)
    arrays = floats | rest
    (batch,) = jax.export.symbolic_shape("batch")
    symbolic = {
        k: jax.ShapeDtypeStruct(a.shape if k == "class_weight" else (batch, *a.shape[1:]), a.dtype)
        for k, a in arrays.items()
    }
    exported = jax.export.export(jax.jit(partial(rows, name)))(symbolic)
    assert_close(exported.call(arrays), rows(name, arrays), ulps=8)


# --- shards -----------------------------------------------------------------------------------------------------------


def one_device():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))


@each_function
def test_shard_map(name):
    """Examples sharded, losses summed over the mesh axis, the gradient taken through it."""
    arrays, shared = split_examples(name)
    scores = arrays.pop("scores")
    sharded = PartitionSpec("data")

    def local(scores, example):
        return jax.lax.psum(rows(name, {"scores": scores} | example | shared).sum(), "data")

    total = jax.shard_map(local, mesh=one_device(), in_specs=(sharded, sharded), out_specs=PartitionSpec())
    expected = jax.value_and_grad(lambda scores: rows(name, {"scores": scores} | arrays | shared).sum())(scores)
    assert_close(jax.jit(jax.value_and_grad(total))(scores, arrays), expected, ulps=SIZE)


# --- what compiles again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss_weight"])
def test_traced_scalar_does_not_retrace(option):
    traces = []

    @jax.jit
    def loss(value):
        traces.append(value)
        return jxent.cross_entropy(jnp.asarray(SCORES), jnp.asarray(INDICES), **{option: value})

    losses = [loss(value) for value in (0.0, 0.1, 0.2)]
    assert len(traces) == 1
    static = [jxent.cross_entropy(SCORES, INDICES, **{option: value}) for value in (0.0, 0.1, 0.2)]
    assert len(set(map(float, losses))) == 3
    assert_close(jnp.stack(losses), jnp.stack(static), ulps=8)


@pytest.mark.parametrize("at", [0.0, 0.2])
@pytest.mark.parametrize("labels", [INDICES, PROBABILITIES], ids=["index", "probability"])
def test_gradients_of_traced_scalars(labels, at, x64):
    """Against the loss itself, which is linear in both: uniform minus label cost, and the mean squared normalizer."""
    arrays = jnp.asarray(SCORES), jnp.asarray(labels)

    def loss(smoothing, z):
        return jxent.cross_entropy(*arrays, class_weight=CLASS_WEIGHT, label_smoothing=smoothing, z_loss_weight=z)

    by_smoothing, by_z = jax.jit(jax.grad(loss, argnums=(0, 1)))(at, at)
    assert_close(by_smoothing, loss(1.0, 0.0) - loss(0.0, 0.0), ulps=16 * SIZE)
    assert_close(by_z, loss(0.0, 1.0) - loss(0.0, 0.0), ulps=16 * SIZE)


def compilations(caplog, call, *arguments, **keywords):
    """How many programs the call compiled."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        call(*arguments, **keywords)
    return sum(record.getMessage().startswith("Compiling ") for record in caplog.records)


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss_weight"])
def test_eager_calls_compile_once(caplog, option):
    """New values in arrays reuse the program, a new Python number does not: it is part of it."""
    scores, labels = jnp.asarray(SCORES), jnp.asarray(INDICES)
    others = scores + 1, labels * 0
    values = [jnp.asarray(value, scores.dtype) for value in (0.0, 0.1, 0.2)]
    run = partial(compilations, caplog, jxent.cross_entropy)
    jax.clear_caches()
    assert run(scores, labels, **{option: values[0]}) > 0
    assert run(scores, labels, **{option: values[1]}) == 0
    assert run(*others, **{option: values[2]}) == 0
    assert run(scores, labels, **{option: 0.1}) > 0
    assert run(*others, **{option: 0.1}) == 0
    assert run(scores, labels, **{option: 0.2}) > 0


@pytest.mark.parametrize("name", short([name for name in CASES if name != "logsumexp"], *FUNCTIONS[2:]))
def test_eager_calls_do_not_compile_for_new_values(caplog, name):
    floats, rest = inputs(name)
    others = jax.tree.map(lambda a: a * 2, floats)
    jax.clear_caches()
    assert compilations(caplog, call, name, floats | rest) > 0
    assert compilations(caplog, call, name, others | rest) == 0


def test_python_numbers_that_switch_off_leave_no_trace():
    """0.0 and None give the program of the call without the option; a traced 0.0 cannot."""
    arrays = jnp.asarray(SCORES), jnp.asarray(INDICES)

    def program(**options):
        return str(jax.make_jaxpr(partial(jxent.cross_entropy, **options))(*arrays))

    assert program(label_smoothing=0.0, z_loss_weight=0, logit_softcap=None) == program()
    assert program(label_smoothing=jnp.float32(0)) != program()


# --- labels of the next token -----------------------------------------------------------------------------------------


def test_next_token_labels_under_transformations():
    tokens = jnp.arange(12).reshape(3, 4)
    expected = np.array([[1, 2, 3, -100], [5, 6, 7, -100], [9, 10, 11, -100]])
    f = jxent.next_token_labels
    exported = jax.export.export(jax.jit(f), platforms=["cpu", "cuda", "rocm", "tpu"])(tokens)
    forms = {
        "jit": jax.jit(f),
        "vmap": jax.vmap(f),
        "vmap over the last axis": lambda tokens: jax.vmap(f, in_axes=-1)(tokens.T),
        "map": partial(jax.lax.map, f),
        "scan": lambda tokens: jax.lax.scan(lambda _, row: (None, f(row)), None, tokens)[1],
        "ahead of time": jax.jit(f).lower(tokens).compile(),
        "export": exported.call,
        "shard_map": jax.shard_map(
            f, mesh=one_device(), in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
        ),
    }
    for name, form in forms.items():
        np.testing.assert_array_equal(form(tokens), expected, err_msg=name)
