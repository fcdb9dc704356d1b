"""Derivatives of sharded losses beyond the gradient: those of one device.

Forward mode, second and third derivatives, `vmap` over gradients, and checkpoints.
"""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from grids import short
from hlo import collectives
from jax import lax
from jax.sharding import PartitionSpec as P
from sharded_calls import (
    DIVERGENCES,
    HIDDEN,
    KERNEL,
    LABELS,
    POSITIONS,
    arrays_of,
    assert_equal,
    in_shards,
    linear_loss,
    mapped_by_vmap,
    mesh_of,
    put,
    specs_in_shard_map,
    value_and_grad,
)
from sharded_layouts import MOVED, axes_of, numbers_alone_in_the_loop, placed

pytestmark = pytest.mark.usefixtures("x64")


def per_example(hidden, kernel, labels):
    return jax.vmap(jax.value_and_grad(linear_loss, 1), in_axes=(0, None, 0))(hidden, kernel, labels)


def hessian_by_kernel(hidden, kernel, labels):
    return jax.jvp(lambda k: jax.grad(linear_loss, 1)(hidden, k, labels), (kernel,), (jnp.cos(kernel),))[1]


def scanned(hidden, kernel, labels):
    def step(kernel, total, scale):
        return total + jax.checkpoint(linear_loss)(scale * hidden, kernel, labels), None

    return jax.grad(lambda kernel: lax.scan(partial(step, kernel), 0.0, jnp.arange(1.0, 3))[0])(kernel)


@functools.cache
def transformed_on_one_device(f):
    return jax.jit(f)(HIDDEN, KERNEL, LABELS)


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_transformations_of_sharded_losses(mode):
    """`vmap` over examples, Hessian-vector products, and checkpoints in a scan."""
    mesh, specs = mesh_of(mode, data=4, vocab=2), (P("data"), P(None, "vocab"), P("data"))
    sharded = [put(mesh, a, s) for a, s in zip((HIDDEN, KERNEL, LABELS), specs, strict=True)]
    for f in (per_example, hessian_by_kernel, scanned):
        assert_equal(jax.jit(f)(*sharded), transformed_on_one_device(f))


# --- forward mode -----------------------------------------------------------------------------------------------------


def along(name, second, f=None, **more):
    """The call and its derivative along the cosines of all floating-point arguments.

    With `second` they come with the gradients of that derivative. `f` replaces the function of the call.
    """
    plain, wrt = value_and_grad(name, **more)
    f = plain if f is None else f

    def derivatives(*arrays):
        arrays = list(map(jnp.asarray, arrays))
        at = tuple(arrays[i] for i in wrt)

        def derivative(*at):
            def moving(*at):
                every = dict(enumerate(arrays)) | dict(zip(wrt, at, strict=True))
                return f(*every.values())

            return jax.jvp(moving, at, tuple(map(jnp.cos, at)))

        if not second:
            return derivative(*at)
        tangent_first = jax.value_and_grad(lambda *at: derivative(*at)[::-1], range(len(at)), has_aux=True)
        (tangent, value), gradients = tangent_first(*at)
        return (value, tangent), gradients

    return derivatives


def layout_of(name):
    return "FSDP and vocabulary" if "linear" in name else "batch, sequence, vocabulary"


def on_shards(name, check_vma):
    """The `shard_map` of the call's arrays over four shards of the classes."""
    mesh, specs = mesh_of("Auto", vocab=4), specs_in_shard_map(name)
    return partial(jax.shard_map, mesh=mesh, in_specs=specs, check_vma=check_vma)


@functools.cache
def along_on_one_device(name, second):
    return jax.jit(along(name, second))(*arrays_of(name))


MOVING = (
    *("cross_entropy", "cross_entropy-all", "cross_entropy-probabilities", "nll_loss-probabilities"),
    *("linear-all", "linear-probabilities", "linear-none"),
    *("cross_entropy-sparse", "nll_loss-sparse", "linear-sparse", *DIVERGENCES),
)
SHORT_UNDER_JIT = ("cross_entropy-all", "cross_entropy-probabilities", "linear-all", "linear-none", "linear-kl")
SHORT_IN_SHARD_MAP = ("cross_entropy-all", "nll_loss-probabilities", "linear-all", "linear-none", "linear-kl")
SECOND = ("cross_entropy-probabilities", "linear-none")


@pytest.mark.covering("linear-none-Auto", "cross_entropy-probabilities-Explicit")
@pytest.mark.parametrize("mode", ["Auto", "Explicit", "Named"])
@pytest.mark.parametrize("name", short(MOVING, *SHORT_UNDER_JIT))
def test_forward_mode_under_jit(name, mode):
    layout = layout_of(name)
    names, arrays = axes_of(name, layout, mode), placed(name, layout, mode)
    program = jax.jit(along(name, second=False, **names)).lower(*arrays).compile()
    wanted = along_on_one_device(name, second=name in SECOND)
    assert_equal(program(*arrays), wanted[0] if name in SECOND else wanted)
    if name in SECOND:
        assert_equal(jax.jit(along(name, second=True, **names))(*arrays), wanted)
    text = program.as_text()
    if "linear" in name:
        found = numbers_alone_in_the_loop(text, layout)
        gathered = sum(c.size for c in found if c.kind == "all-gather" and c.size >= KERNEL.size // 8)
        # The program gathers the kernel and its tangent; a divergence has two kernels.
        times = 4 if name in DIVERGENCES else 2
        assert gathered <= times * sum(size for kind, size in MOVED.get(layout, []) if kind == "all-gather")
        assert all(c.size <= POSITIONS for c in found if c.kind != "all-gather")
    else:
        assert all(c.size <= POSITIONS * 8 for c in collectives(text))


@pytest.mark.covering("linear-none-True-False")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", short(MOVING, *SHORT_IN_SHARD_MAP))
def test_forward_mode_in_shard_map(name, check_vma, inside):
    """Forward mode goes through the map, or is inside of it."""
    mapped = on_shards(name, check_vma)
    second = name in SECOND and not inside
    if inside:
        f = mapped(along(name, second, axis_name="vocab"), out_specs=P())
    else:
        f = along(name, second, mapped(value_and_grad(name, axis_name="vocab")[0], out_specs=P()))
    assert_equal(jax.jit(f)(*arrays_of(name)), along_on_one_device(name, second))


@pytest.mark.parametrize("mode", ["Auto", "Explicit", "Named", "checked", "unchecked"])
@pytest.mark.parametrize("name", short(("linear-sparse", "js-none", "linear-kl")))
def test_gradients_of_tangents(name, mode):
    """Reverse over forward mode works for losses that are not in `SECOND`, too."""
    if mode in ("checked", "unchecked"):
        f, _ = value_and_grad(name, axis_name="vocab")
        f = on_shards(name, mode == "checked")(f, out_specs=P())
        found = jax.jit(along(name, second=True, f=f))(*arrays_of(name))
    else:
        layout = layout_of(name)
        program = jax.jit(along(name, second=True, **axes_of(name, layout, mode)))
        found = program(*placed(name, layout, mode))
    assert_equal(found, along_on_one_device(name, second=True))


# --- Hessian-vector products ------------------------------------------------------------------------------------------


ORDERS = ["forward over reverse", "reverse over forward", "reverse over reverse"]
TWICE = ("cross_entropy", "cross_entropy-all", "cross_entropy-probabilities", "linear", "linear-all", "logsumexp")


def argument_of(name):
    """The number of the argument of `value_and_grad(name)` whose vocabulary is sharded."""
    return 2 if "linear" in name else 1


def hessian_vector_product(f, argument, order, *arrays):
    """The Hessian by one argument, times the cosine of that argument."""
    arrays = list(map(jnp.asarray, arrays))
    at, direction = arrays[argument], jnp.cos(arrays[argument])

    def gradient(at):
        return jax.grad(f, argument)(*arrays[:argument], at, *arrays[argument + 1 :])

    def tangent(at):
        return jax.jvp(lambda at: f(*arrays[:argument], at, *arrays[argument + 1 :]), (at,), (direction,))[1]

    if order == "forward over reverse":
        return jax.jvp(gradient, (at,), (direction,))[1]
    return jax.grad(tangent if order == "reverse over forward" else lambda at: jnp.vdot(gradient(at), direction))(at)


@functools.cache
def product_on_one_device(name, order):
    f, _ = value_and_grad(name)
    return jax.jit(partial(hessian_vector_product, f, argument_of(name), order))(*arrays_of(name))


@pytest.mark.covering(
    *("linear-all-reverse over forward", "cross_entropy-all-reverse over reverse", "logsumexp-forward over reverse")
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", short(TWICE, "cross_entropy-all", "linear-all", "logsumexp"))
def test_second_derivatives_in_shard_map(name, order):
    """A Hessian-vector product by the sharded argument, of which each device has one shard."""
    argument, (f, _) = argument_of(name), value_and_grad(name, axis_name="vocab")
    specs = specs_in_shard_map(name)
    product = partial(hessian_vector_product, f, argument, order)
    product = jax.shard_map(product, mesh=mesh_of("Auto", vocab=4), in_specs=specs, out_specs=specs[argument])
    assert_equal(jax.jit(product)(*arrays_of(name)), product_on_one_device(name, order))


@pytest.mark.covering("linear-all-reverse over forward")
@pytest.mark.parametrize("order", short(ORDERS, "reverse over forward", "reverse over reverse"))
@pytest.mark.parametrize("name", short(TWICE, "cross_entropy-probabilities", "linear-all"))
def test_second_derivatives_in_vmap(name, order):
    argument, (f, axes) = argument_of(name), mapped_by_vmap(name)
    product = jax.jit(partial(hessian_vector_product, f, argument, order))(*map(in_shards, arrays_of(name), axes))
    assert_equal(product, in_shards(product_on_one_device(name, order), axes[argument]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["cross_entropy", "linear"])
def test_third_derivatives_in_vmap(name):
    """The modes come in every order. If the second is reverse, JAX has no derivative of the linear loss (`pmax`)."""
    argument, (whole, _), (f, axes) = argument_of(name), value_and_grad(name), mapped_by_vmap(name)

    def along(f, modes, *arrays):
        arrays = list(map(jnp.asarray, arrays))
        direction = jnp.cos(arrays[argument])

        def of_one(f, mode):
            if mode == "f":
                return lambda at: jax.jvp(f, (at,), (direction,))[1]
            return lambda at: jnp.vdot(jax.grad(f)(at), direction)

        def g(at):
            return f(*arrays[:argument], at, *arrays[argument + 1 :])

        for mode in reversed(modes):
            g = of_one(g, mode)
        return g(arrays[argument])

    for modes in itertools.product("fr", repeat=3):
        run = jax.jit(partial(along, f, modes))
        shards = list(map(in_shards, arrays_of(name), axes))
        if name == "linear" and modes[1] == "r":
            with pytest.raises(NotImplementedError, match="pmax"):
                run(*shards)
        else:
            assert_equal(run(*shards), jax.jit(partial(along, whole, modes))(*arrays_of(name)))
