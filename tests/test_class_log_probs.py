"""`linear_log_probs` and `linear_top_k`: log-probabilities of k classes and of the rest, without the logits.

Values and derivatives are compared with full logits in float64, accuracy in float32 with NumPy in float64.
"""

import re
from functools import partial

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import optimized
from grids import short
from hlo import collectives
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from sharded_calls import mesh_of, put

import jxent
from jxent._backend.cpu import CPU

B, L, C, K, F = 4, 6, 16, 5, 3
RNG = np.random.default_rng(31)
HIDDEN, KERNEL, BIAS = RNG.normal(size=(B, L, F)), 2 * RNG.normal(size=(F, C)), RNG.normal(size=C)
INDICES = RNG.integers(0, C, (B, L, K)).astype(np.int32)
INDICES[0, 0] = [2, 7, 2, -1, 2]  # a class that repeats, and no class
INDICES[1, 1] = -1
WHERE = RNG.random((B, L)) < 0.8
COTANGENTS = RNG.normal(size=(B, L, K)), RNG.normal(size=(B, L))
FLOATS = (HIDDEN, KERNEL, BIAS)
TEMPERATURES = {"none": 1.0, "scalar": np.array(0.7), "by position": RNG.uniform(0.5, 2, (B, L))}


def plain(hidden, kernel, indices, *, bias=0.0, logit_softcap=None, temperature=1.0, where=True):
    """The definition; `indices` may be the number of the largest classes."""
    x = hidden @ kernel + bias
    x = x if logit_softcap is None else logit_softcap * jnp.tanh(x / logit_softcap)
    x = x / jnp.asarray(temperature)[..., None]
    indices = jax.lax.top_k(x, indices)[1] if isinstance(indices, int) else indices
    log_p = jax.nn.log_softmax(x)
    listed = jnp.any(indices[..., None] == jnp.arange(x.shape[-1]), -2)
    rest = jax.nn.logsumexp(jnp.where(listed, -jnp.inf, log_p), -1)
    log_probs = jnp.where(indices == -1, -jnp.inf, jnp.take_along_axis(log_p, jnp.maximum(indices, 0), -1))
    where = jnp.broadcast_to(where, rest.shape)
    of_entries = where[..., None]
    return tuple(jnp.where(*a, 0) for a in ((of_entries, indices), (of_entries, log_probs), (where, rest)))


FUNCTIONS = {"log_probs": (jxent.linear_log_probs, INDICES), "top_k": (jxent.linear_top_k, K)}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def scalar(function, indices, hidden, kernel, bias, temperature=1.0, *, cotangents=COTANGENTS, **options):
    """A sum of all numbers with gradients; an entry without a class has a cotangent of 0."""
    _, log_probs, log_rest = function(hidden, kernel, indices, bias=bias, temperature=temperature, **options)
    to_probs, to_rest = cotangents
    return jnp.sum(jnp.where(log_probs == -jnp.inf, 0, to_probs * log_probs)) + jnp.sum(to_rest * log_rest)


def along(gradient, *floats):
    return sum(map(jnp.vdot, gradient(*floats), map(jnp.cos, floats)))


def pushed(f, *floats):
    return jax.jvp(f, floats, tuple(map(jnp.cos, floats)))[1]


def gradient(f):
    return lambda *floats: jax.grad(f, range(len(floats)))(*floats)


# name: the derivative of a function of arrays
DERIVATIVES = {
    "reverse": gradient,
    "forward": lambda f: partial(pushed, f),
    "forward over reverse": lambda f: partial(pushed, gradient(f)),
    "reverse over forward": lambda f: gradient(partial(pushed, f)),
    "reverse over reverse": lambda f: gradient(partial(along, gradient(f))),
    "forward over forward": lambda f: partial(pushed, partial(pushed, f)),
}


@each_function
@pytest.mark.parametrize("cap", short([None, 3.0], 3.0))
@pytest.mark.parametrize("block_size", short([5, None], 5))
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("derivative", short(DERIVATIVES, "reverse", "forward over reverse"))
def test_full_logits(name, cap, block_size, temperature, derivative):
    """Values, gradients and second derivatives in all orders of the modes."""
    function, indices = FUNCTIONS[name]
    options = {"logit_softcap": cap, "where": WHERE}
    temperature = TEMPERATURES[temperature]
    floats = FLOATS if temperature is TEMPERATURES["none"] else (*FLOATS, temperature)
    with jax.enable_x64(True):
        mine = partial(function, block_size=block_size)
        found, expected = (
            f(HIDDEN, KERNEL, indices, bias=BIAS, temperature=temperature, **options) for f in (mine, plain)
        )
        assert isinstance(found, jxent.ClassLogProbs)
        assert found.indices.dtype == jnp.int32
        chex.assert_trees_all_close(tuple(found), expected, rtol=1e-12, atol=1e-13)
        found, expected = (
            jax.jit(DERIVATIVES[derivative](partial(scalar, f, indices, **options)))(*floats) for f in (mine, plain)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-11, atol=1e-12)


def in_float64(logits, indices, cotangents):
    """(log-probabilities, rest, gradient by the logits) in float64, for distinct indices."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    e = np.exp(x)
    listed = np.zeros(x.shape, bool)
    np.put_along_axis(listed, indices, True, -1)
    of_listed, of_rest = (np.where(keep, e, 0).sum(-1, keepdims=True) for keep in (listed, ~listed))
    total, (to_probs, to_rest) = of_listed + of_rest, cotangents
    small = of_listed < of_rest
    log_rest = np.log1p(-of_listed / total, where=small, out=np.log(of_rest / total))
    largest = np.arange(x.shape[-1]) == x.argmax(-1)[:, None]
    others = np.where(largest, 0, e).sum(-1, keepdims=True)
    log_others = np.log1p(others)
    log_p = np.take_along_axis(x - log_others, indices, -1)
    p, rest = e / total, of_rest / total
    c = np.zeros(x.shape)
    np.put_along_axis(c, indices, to_probs, -1)
    sum_c = c.sum(-1, keepdims=True)
    listed_gradient = np.where(largest, c * (others / total) - p * (sum_c - c + to_rest), c - p * (sum_c + to_rest))
    gradient = np.where(listed, listed_gradient, p * (to_rest * (of_listed / total) / rest - sum_c))
    return log_p, log_rest[..., 0], gradient


@pytest.mark.parametrize("which", ["largest listed", "largest in the rest"])
@pytest.mark.parametrize("offset", short([0.0, 1e4], 1e4))
def test_float32(which, offset):
    """At margins of 0 to 80: rests of 1e-33 to 1 - 1e-33, each number as accurate as its logits."""
    rng = np.random.default_rng(3)
    margins = np.repeat(np.arange(0, 84, 4.0), 3)
    logits = rng.normal(size=(len(margins), 700))
    top = rng.integers(0, 700, len(margins))
    logits[np.arange(len(margins)), top] = logits.max(-1) + margins
    logits = (logits + offset).astype(np.float32)
    order = np.argsort(-logits, -1)
    indices = (order[:, :4] if which == "largest listed" else order[:, 3:10]).astype(np.int32)
    cotangents = np.abs(rng.normal(size=indices.shape)), np.zeros((len(margins), 1))
    for part in (cotangents, (0 * cotangents[0], np.ones((len(margins), 1)))):
        to_probs, to_rest = (a.astype(np.float32) for a in part)

        def total(kernel, to_probs=to_probs, to_rest=to_rest):
            out = jxent.linear_log_probs(np.eye(len(margins), dtype=np.float32), kernel, indices, precision="highest")
            return jnp.vdot(to_probs, out.log_probs) + jnp.vdot(to_rest[:, 0], out.log_rest), out

        gradient, out = jax.grad(total, has_aux=True)(jnp.asarray(logits))
        log_p, log_rest, expected = in_float64(logits, indices, (to_probs, to_rest))
        np.testing.assert_allclose(out.log_probs, log_p, rtol=5e-6)
        np.testing.assert_allclose(out.log_rest, log_rest, rtol=5e-6)
        size = np.abs(expected) + 1e-36
        assert np.max(np.abs(gradient - expected) / size) < (5e-6 if to_rest.any() else 2e-5)


@pytest.mark.parametrize("rest", [1e-30, 1e-9, 0.5, 1 - 1e-9])
def test_rest_of_any_size(rest):
    """Its logarithm, by a bias that gives the two listed classes all other probability."""
    bias = np.log(np.array([(1 - rest) * 0.25, (1 - rest) * 0.75, rest * 0.5, rest * 0.5]))
    bias[:2] = np.log(np.array([0.25, 0.75])) + (np.log1p(-rest) if rest < 0.5 else np.log(1e-9 if rest > 0.9 else 0.5))
    bias = bias.astype(np.float32)
    x = bias.astype(np.float64)
    listed, others = np.exp(x[:2]).sum(), np.exp(x[2:]).sum()
    expected = np.log(others / (listed + others)) if rest < 0.9 else np.log1p(-listed / (listed + others))
    out = jxent.linear_log_probs(np.zeros((1, 1), np.float32), np.zeros((1, 4), np.float32), [[0, 1]], bias=bias)
    np.testing.assert_allclose(out.log_rest[0], expected, rtol=1e-6)


def test_bfloat16():
    """The logits stay float32: log-probabilities are those of a float32 product of bfloat16 arrays."""
    hidden, kernel = (jnp.asarray(a, jnp.bfloat16) for a in (HIDDEN, KERNEL))
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    found = jxent.linear_log_probs(hidden, kernel, INDICES)
    expected = plain(logits, np.eye(C, dtype=np.float32), INDICES)
    chex.assert_trees_all_close(tuple(found), expected, rtol=2e-6, atol=1e-6)
    assert found.log_probs.dtype == found.log_rest.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_16_bit_gradients(dtype):
    floats = [jnp.asarray(a, dtype) for a in FLOATS]
    gradients = jax.grad(partial(scalar, jxent.linear_log_probs, INDICES, block_size=5), (0, 1, 2))(*floats)
    upcast = [a.astype(jnp.float32) for a in floats]
    expected = jax.grad(partial(scalar, plain, INDICES), (0, 1, 2))(*upcast)
    for gradient, other in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        assert np.max(np.abs(gradient - other)) < 8 * float(jnp.finfo(dtype).eps) * np.max(np.abs(other))


def test_all_classes():
    """The rest is empty: -inf, with a gradient of 0."""
    indices = jnp.broadcast_to(jnp.arange(C), (B, L, C))
    for function, of_indices in ((jxent.linear_log_probs, indices), (jxent.linear_top_k, C)):
        out, pull = jax.vjp(lambda h, k: function(h, k, of_indices)[1:], HIDDEN, KERNEL)  # noqa: B023
        assert np.all(out[1] == -jnp.inf)
        assert not any(np.any(g) for g in pull((jnp.zeros_like(out[0]), jnp.ones_like(out[1]))))


def test_one_class():
    """The same number, and the same gradient, as `linear_cross_entropy` has for a label."""

    def of_label(hidden, kernel):
        return -jxent.linear_cross_entropy(hidden, kernel, np.abs(INDICES[..., 0]), reduction="none")

    def of_class(hidden, kernel):
        return jxent.linear_log_probs(hidden, kernel, np.abs(INDICES[..., :1])).log_probs[..., 0]

    found, expected = (jax.vjp(f, HIDDEN, KERNEL) for f in (of_class, of_label))
    chex.assert_trees_all_close(found[0], expected[0], rtol=1e-6)
    to_all = jnp.asarray(COTANGENTS[1], jnp.float32)
    chex.assert_trees_all_close(found[1](to_all), expected[1](to_all), rtol=1e-5, atol=1e-6)


def test_masked_classes():
    """A class with a bias of -inf has no probability, listed or not, and no gradient is NaN."""
    bias = jnp.asarray(BIAS, jnp.float32).at[np.array([2, 5, 9])].set(-jnp.inf)

    def total(hidden, kernel, bias):
        out = jxent.linear_log_probs(hidden, kernel, INDICES, bias=bias)
        return jnp.sum(jnp.exp(out.log_probs)) + jnp.sum(out.log_rest), out

    gradients, out = jax.grad(total, (0, 1, 2), has_aux=True)(*FLOATS[:2], bias)
    assert np.all((np.isin(INDICES, [2, 5, 9]) | (INDICES == -1)) == (out.log_probs == -jnp.inf))
    assert all(np.all(np.isfinite(g)) for g in gradients)
    of_row = jxent.linear_log_probs(HIDDEN, KERNEL, INDICES, bias=jnp.full(C, -jnp.inf))
    assert np.all(of_row.log_probs == -jnp.inf)
    assert np.all(of_row.log_rest == -jnp.inf)


def test_out_of_range():
    """NaN, in the entry, the rest and the position's gradient, and a report under checkify; -1 is no fault."""
    for bad in (C, -2, 2**31 - 1):
        indices = INDICES.copy()
        indices[2, 3, 1] = bad
        out = jxent.linear_log_probs(HIDDEN, KERNEL, indices)
        assert np.argwhere(np.isnan(out.log_probs)).tolist() == [[2, 3, 1]]
        assert np.argwhere(np.isnan(out.log_rest)).tolist() == [[2, 3]]
        gradient = jax.grad(lambda h: jxent.linear_log_probs(h, KERNEL, indices).log_rest.sum())(HIDDEN)  # noqa: B023
        assert np.argwhere(np.isnan(gradient).any(-1)).tolist() == [[2, 3]]
        error, _ = checkify.checkify(partial(jxent.linear_log_probs, HIDDEN, KERNEL))(indices)
        assert re.search(rf"index {bad} is out of range for {C} classes, at \[2 3 1\]", error.get())
        masked = jxent.linear_log_probs(HIDDEN, KERNEL, indices, where=np.arange(L) != 3)
        assert not np.isnan(masked.log_rest).any()
    error, _ = checkify.checkify(partial(jxent.linear_log_probs, HIDDEN, KERNEL))(INDICES)
    assert error.get() is None


def test_masked_positions():
    """All numbers are 0, and NaN in a masked hidden state reaches no gradient."""
    hidden = np.where(WHERE[..., None], HIDDEN, np.nan)
    for function, indices in FUNCTIONS.values():
        out = function(hidden, KERNEL, indices, where=WHERE, block_size=5)
        assert not any(np.any(np.asarray(a)[~WHERE]) for a in out)
        f = partial(scalar, function, indices, where=WHERE, block_size=5)
        assert all(np.all(np.isfinite(g)) for g in jax.grad(f, (0, 1, 2))(hidden, KERNEL, BIAS))


@pytest.mark.parametrize(("classes", "k"), [(5000, 10), (5003, 64), (640, 9), (70, 64)])
def test_order_of_top_k(classes, k):
    """That of `lax.top_k`, with many ties and with -inf, for the backend that selects from groups."""
    logits = RNG.integers(0, 30, (2, 3, classes)).astype(np.float32)
    for rows in (logits, np.where(logits < 28, -np.inf, logits)):
        chex.assert_trees_all_equal(CPU().top_k(jnp.asarray(rows), k, classes), tuple(jax.lax.top_k(rows, k)))


def test_k_of_few_classes_on_each_shard():
    """k is more than the classes of a shard; equal logits on different shards come in the order of their classes."""
    kernel = RNG.integers(-1, 2, (F, C)).astype(np.float32)
    hidden = RNG.integers(-1, 2, (B, L, F)).astype(np.float32)
    mesh = mesh_of("Auto", vocab=8)
    with jax.set_mesh(mesh):
        out = jxent.linear_top_k(hidden, kernel, K, axis_name="vocab")
    np.testing.assert_array_equal(out.indices, jax.lax.top_k(hidden @ kernel, K)[1])


@each_function
@pytest.mark.covering
@pytest.mark.parametrize("mode", ["Auto", "Explicit", "Named", "shard_map"])
@pytest.mark.parametrize("order", [1, 2])
def test_meshes(name, mode, order):
    """Positions and vocabulary sharded: the same numbers, and only numbers of entries are sent in the loop."""
    function, indices = FUNCTIONS[name]
    options = {"block_size": 8, "where": WHERE}
    mesh = mesh_of("Explicit" if mode == "Explicit" else "Auto", data=2, sequence=2, vocab=2)
    specs = P("data", "sequence"), P(None, "vocab"), P("vocab")
    with jax.enable_x64(True), jax.set_mesh(mesh):
        if mode == "Named":
            options |= {"axis_name": "vocab", "batch_axis_name": P("data", "sequence")}

        def total(*arrays):
            hidden, kernel, bias, temperature, where, *rest = arrays
            rest = (temperature, *rest)
            given = INDICES if name == "log_probs" else K
            if mode != "shard_map":
                return scalar(function, given, hidden, kernel, bias, rest[0], cotangents=rest[1:], **options)

            def on_each_device(hidden, kernel, bias, where, indices, temperature, *cotangents):
                given = indices if name == "log_probs" else K
                local = {"block_size": 2, "where": where, "axis_name": "vocab"}
                return jax.lax.psum(
                    scalar(function, given, hidden, kernel, bias, temperature, cotangents=cotangents, **local),
                    ("data", "sequence"),
                )

            in_specs = *specs, specs[0], specs[0], P(), specs[0], specs[0]
            return jax.shard_map(on_each_device, in_specs=in_specs, out_specs=P())(
                hidden, kernel, bias, where, INDICES, *rest
            )

        def derivative(total, floats, *others):
            gradient = jax.value_and_grad(lambda *floats: total(*floats, *others), (0, 1, 2, 3))
            if order == 1:
                return gradient(*floats)
            return jax.jvp(gradient, floats, tuple(0.1 * jnp.cos(a) for a in floats))[1]

        arrays = [put(mesh, a, s) for a, s in zip(FLOATS, specs, strict=True)]
        arrays.append(put(mesh, TEMPERATURES["scalar"], P()))
        others = [put(mesh, a, specs[0]) for a in (WHERE, *COTANGENTS)]
        program = jax.jit(partial(derivative, total)).lower(tuple(arrays), *others).compile()
        found = program(tuple(arrays), *others)
    with jax.enable_x64(True):
        reference = partial(scalar, plain, indices, where=WHERE)
        expected = derivative(
            lambda h, k, b, t, w, *c: reference(h, k, b, t, cotangents=c),
            (*FLOATS, TEMPERATURES["scalar"]),
            WHERE,
            *COTANGENTS,
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-11, atol=1e-11)
    if order == 1:
        in_loop = [c for c in collectives(program.as_text()) if c.in_loop]
        # A block has 2 positions on each device, and each shard sends k + 1 logits and classes of a position.
        assert all(c.kind == "all-reduce" and c.size <= 2 * 2 * (K + 1) for c in in_loop), in_loop


@each_function
def test_memory(name):
    """Two blocks of logits at most, and no array of positions x vocabulary."""
    function, _ = FUNCTIONS[name]
    n, classes, block, k = 400, 4099, 50, 8

    def total(hidden, kernel, indices):
        out = function(hidden, kernel, indices if name == "log_probs" else k, block_size=block)
        return jnp.sum(out.log_probs) + jnp.sum(out.log_rest)

    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((n, 4), "f4"), ((4, classes), "f4"), ((n, k), "i4"))]
    for f, blocks in ((total, 1.3), (jax.grad(total, (0, 1)), 2.3)):
        program = optimized(f).lower(*shapes).compile()
        assert program.memory_analysis().temp_size_in_bytes < blocks * 4 * block * classes
        assert f"[{n},{classes}]" not in program.as_text()


def test_export():
    """`ClassLogProbs` is serialized as a result."""
    exported = jax.export.export(jax.jit(partial(jxent.linear_top_k, k=2)), platforms=["cpu", "cuda", "tpu"])(
        jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(KERNEL, jnp.float32)
    )
    out = jax.export.deserialize(exported.serialize()).call(
        jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(KERNEL, jnp.float32)
    )
    chex.assert_trees_all_close(out, jxent.linear_top_k(HIDDEN, KERNEL, 2), rtol=1e-6)


BAD = [
    ("log_probs", {"indices": np.zeros((B, L))}, TypeError, "indices must be integers"),
    ("log_probs", {"indices": INDICES[..., 0]}, ValueError, r"indices\[..., None\]"),
    ("log_probs", {"indices": INDICES[0, 0]}, ValueError, "broadcast_to"),
    ("log_probs", {"indices": INDICES[..., :0]}, ValueError, "at least one class"),
    ("log_probs", {"indices": None}, TypeError, "must be an array, got None"),
    ("top_k", {"k": 0}, ValueError, "k must be at least 1"),
    ("top_k", {"k": C + 1}, ValueError, f"k must be at most the number of classes, {C}, got {C + 1}"),
    ("top_k", {"k": 2.0}, TypeError, "k must be a Python integer"),
    ("top_k", {"k": jnp.array(2)}, TypeError, "static_argnames"),
    ("top_k", {"where": np.ones((B, L))}, TypeError, "where must be boolean"),
    ("top_k", {"axis_name": "vocab"}, ValueError, "no mesh is in use"),
    ("log_probs", {"reduction": "none"}, TypeError, "there is no argument reduction"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "says"), BAD, ids=range(len(BAD)))
def test_bad_input(name, arguments, error, says):
    function, indices = FUNCTIONS[name]
    good = {"hidden": HIDDEN, "kernel": KERNEL, {"log_probs": "indices", "top_k": "k"}[name]: indices}
    with pytest.raises(error, match=rf"(?s)^linear_{name}: .*{says}"):
        function(**(good | arguments))


def test_axis_of_positions_in_shard_map():
    """Nothing is summed over positions, so the name of their axis has no use there."""
    mesh = mesh_of("Auto", data=8)
    f = partial(jxent.linear_top_k, kernel=KERNEL, k=2, batch_axis_name="data")
    with pytest.raises(ValueError, match=r"linear_top_k: batch_axis_name='data' .*leave it out inside jax.shard_map"):
        jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(np.ones((8, F)))
