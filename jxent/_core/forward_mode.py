"""Forward mode for the functions whose gradients are `custom_vjp` rules.

JAX refuses to push tangents through a `custom_vjp`. So each rule here is wrapped in a `custom_jvp`. Its tangents come
from one primitive, which is linear in them: evaluated it is the rule's tangent formula, and transposed it is the `bwd`
of the rule. `jax.jvp` meets the former and `jax.grad` the latter, with the residuals of the rule's `fwd`; so gradients
cost what those of the `custom_vjp` alone would.

Further derivatives, of the residuals, are those of the code: of `fwd`, of `bwd` and of the tangent formula.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero, zero_from_primal
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jxent._core.config import traced_config
from jxent._core.shards import cast, varying
from jxent._core.weights import only

T = TypeVar("T")


def with_forward_mode(rule, tangent, symbolic_zeros=False, program=None):
    """`rule`, which can be differentiated forwards too.

    `rule` is a `custom_vjp` function of (static, *arguments), trees of arrays, that returns a pair (what has gradients,
    what has none); `symbolic_zeros` is that of its `defvjp`. ``tangent(static, residuals, *tangents)`` returns the
    tangents of what has gradients. It is linear in those of the arguments, which are None where an array does not move.
    Likewise the rule's `bwd` meets None for a cotangent of 0, if another is not. `program` returns that of `linear`.
    """

    @partial(jax.custom_jvp, nondiff_argnums=(0,))
    @wraps(rule)
    def function(static, *primals):
        return mapped_with(rule(static, *primals), primals)

    def jvp(static, primals, tangents):
        leaves, tree = jax.tree.flatten(primals)
        directions = tree.flatten_up_to(tangents)
        moving = [i for i, direction in enumerate(directions) if not isinstance(direction, SymbolicZero)]
        if symbolic_zeros:
            leaves = [CustomVJPPrimal(leaf, i in moving) for i, leaf in enumerate(leaves)]
        out, residuals = rule.fwd(static, *tree.unflatten(leaves))
        out = mapped_with(out, primals)
        of_gradients, of_none = out
        differentiable, tree_of_differentiable = jax.tree.flatten(of_gradients)
        still = [zero_from_primal(leaf, symbolic_zeros=True) for leaf in jax.tree.leaves(of_none)]
        out_tree = jax.tree.structure(out)
        kept, kept_tree = jax.tree.flatten(residuals)

        def apply(kept, directions):
            every = [None] * tree.num_leaves
            for i, direction in zip(moving, directions, strict=True):
                every[i] = direction
            moved = tangent(static, kept_tree.unflatten(kept), *tree.unflatten(every))
            return tree_of_differentiable.flatten_up_to(moved)

        def transpose(kept, cotangents):
            gradients = rule.bwd(static, kept_tree.unflatten(kept), out_tree.unflatten([*cotangents, *still]))
            gradients = tree.flatten_up_to(gradients)
            return [gradients[i] for i in moving]

        along, of_devices = [directions[i] for i in moving], program and program()
        moved = linear(apply, transpose, kept, along, differentiable, of_devices, symbolic_zeros=True)
        return out, out_tree.unflatten([*moved, *still])

    function.defjvp(jvp, symbolic_zeros=True)
    return function


def in_one_piece(function: Callable[..., T], plain: Callable[..., T], *operands) -> T:
    """``function(*operands)``, which JAX does not take apart while it separates values from tangents.

    It would look for what does not change in a loop of the function, and so lose the `custom_jvp` rules in it.
    Tangents of any order are those of the function. What is transposed, for gradients, and what `jax.vmap` maps is
    `plain`, which returns the same by operations that have a transpose.
    """
    leaves, tree = jax.tree.flatten(operands)
    structures = []  # of the results, known once the function has been traced

    def flat(function):
        def in_one_piece(*leaves):  # a name that jaxprs show
            out, structure = jax.tree.flatten(function(*tree.unflatten(leaves)))
            structures.append(structure)
            return out

        return in_one_piece

    of_leaves = flat(function)
    out = _in_one_piece(of_leaves, of_leaves if plain is function else flat(plain), leaves)
    return structures[0].unflatten(out)


def _in_one_piece(function, plain, leaves):
    def jvp(primals, tangents):
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]
        along = [tangents[i] for i in moving]
        if function is plain:
            out, moved = jvp_of_moving(function, moving, primals, along)
            return mapped_with(out, primals), moved
        out = rule(*primals)
        floats = [i for i, array in enumerate(out) if jnp.issubdtype(array.dtype, jnp.floating)]

        def pushed(function, *both):
            at, directions = both[: len(primals)], both[len(primals) :]
            moved = jvp_of_moving(function, moving, at, directions)[1]
            return [moved[i] for i in floats]

        def apply(primals, directions):
            return _in_one_piece(partial(pushed, function), partial(pushed, plain), [*primals, *directions])

        def transpose(primals, cotangents):
            moved = partial(pushed, plain, *primals)
            return jax.linear_transpose(moved, *(primals[i] for i in moving))(cotangents)

        moved = iter(linear(apply, transpose, primals, along, [out[i] for i in floats]))
        still = [zero_from_primal(array, symbolic_zeros=True) for array in out]
        return out, [next(moved) if i in floats else still[i] for i in range(len(out))]

    value = function if function is plain else plain_under_vmap(function, plain)
    rule = jax.custom_jvp(lambda *primals: mapped_with(value(*primals), primals))
    rule.defjvp(jvp, symbolic_zeros=True)
    return rule(*leaves)


def plain_under_vmap(function, plain):
    """`function`, but `plain` where `jax.vmap` maps: a list of arrays of arrays."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def _(size, is_mapped, *arrays):
        out = jax.vmap(plain, [0 if each else None for each in is_mapped], axis_size=size)(*arrays)
        return out, [True] * len(out)

    return mapped


def jvp_of_moving(function, moving, arrays, tangents):
    """(``function(*arrays)``, its tangents), where the arrays at the places `moving` have these tangents."""

    def of_moving(*moved):
        every = dict(enumerate(arrays)) | dict(zip(moving, moved, strict=True))
        return function(*every.values())

    return jax.jvp(of_moving, [arrays[i] for i in moving], list(tangents))


@jax.custom_jvp
def moving_where(mask, array):
    """The array, which to differentiation is a constant where the mask is False."""
    return mapped_with(array, mask)


@moving_where.defjvp
def _moving_where_jvp(primals, tangents):
    return moving_where(*primals), only(primals[0], tangents[1])


# --- a value that `jax.vmap` maps wherever it maps its tangent --------------------------------------------------------


def mapped_with(values: T, operands) -> T:
    """The values, trees of arrays, which `jax.vmap` is to map wherever it maps any of the operands.

    For the values of a `custom_jvp` function. If its tangent takes an operand that its value ignores, such as a mask,
    `jax.vmap` over that operand would map the tangent alone. JAX then raises, or returns wrong numbers. To a compiler
    this is nothing.
    """
    leaves, tree = jax.tree.flatten(values)
    return tree.unflatten(mapped_with_p.bind(*leaves, *jax.tree.leaves(operands), number=len(leaves)))


mapped_with_p = Primitive("jxent_mapped_with")
mapped_with_p.multiple_results = True


@mapped_with_p.def_impl
def _values(*operands, number):
    return list(operands[:number])


@mapped_with_p.def_abstract_eval
def _types_of_values(*operands, number):
    return list(operands[:number])


def _jvp_of_values(primals, tangents, *, number):
    return mapped_with_p.bind(*primals, number=number), tangents[:number]


def _transpose_of_values(cotangents, *operands, number):
    return [*cotangents, *[None] * (len(operands) - number)]


def _map_values(axis_data, operands, axes, *, number):
    at = next((i for i, axis in enumerate(axes) if axis is not None), None)
    if at is None:
        return mapped_with_p.bind(*operands, number=number), [None] * number
    names = {"axis_name": axis_data.name, "axis_size": axis_data.size, "spmd_axis_name": axis_data.spmd_name}

    def value_of_each(value, axis):
        return value if axis is not None else jax.vmap(lambda _: value, (axes[at],), **names)(operands[at])

    values = [value_of_each(*pair) for pair in zip(operands[:number], axes, strict=False)]
    # Bound again: another `jax.vmap` around this one may map other operands.
    return mapped_with_p.bind(*values, *operands[number:], number=number), [axis or 0 for axis in axes[:number]]


ad.primitive_jvps[mapped_with_p] = _jvp_of_values
ad.primitive_transposes[mapped_with_p] = _transpose_of_values
batching.fancy_primitive_batchers[mapped_with_p] = _map_values
mlir.register_lowering(mapped_with_p, mlir.lower_fun(_values, multiple_results=True))


# --- the primitive of tangents ----------------------------------------------------------------------------------------


class Map(NamedTuple):
    """Lists of arrays from (residuals, directions), linear in the directions, and from (residuals, cotangents)."""

    apply: Callable[[list[Array], list[Array]], list[Array]]
    transpose: Callable[[list[Array], list[Array | None]], list[Array]]
    symbolic_zeros: bool  # whether `transpose` takes None for a cotangent of 0, if others are not


linear_p = Primitive("jxent_linear")
linear_p.multiple_results = True
# JAX would rewrite a primitive whose program has rules of its new kinds (`jax_custom_jvp3`, `jax_custom_vjp3`) before
# lowering, and would need a rule for that. This one needs none: its operands are arrays, and lowering traces it anew.
linear_p.is_high = lambda *_, **__: False


def linear(apply, transpose, residuals, directions, like, program=None, symbolic_zeros=False):
    """``apply(residuals, directions)``, whose results have the types of `like`, and whose transpose is known.

    `apply` is traced where it is needed, which is not for a gradient. So that JAX sees what its lowering depends on, it
    can be given a `program` that depends on the same.
    """
    config, axes = traced_config(), [varying(array) for array in like]

    def alike(residuals, directions):
        with config():
            return [cast(*result) for result in zip(apply(residuals, directions), axes, strict=True)]

    types = tuple(jax.typeof(array) for array in like)
    map = Map(alike, transpose, symbolic_zeros)
    return linear_p.bind(*residuals, *directions, map=map, number=len(residuals), types=types, program=program)


@linear_p.def_impl
def _apply(*operands, map, number, types, program):
    del types, program
    return map.apply(list(operands[:number]), list(operands[number:]))


@linear_p.def_abstract_eval
def _types(*operands, map, number, types, program):
    del operands, map, number, program
    return types


def _jvp(primals, tangents, **params):
    """The tangent is linear in the residuals' tangents and in those of the directions: the sum of the two parts."""
    map, number = params["map"], params["number"]
    residuals, directions = list(primals[:number]), list(primals[number:])
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]
    parts = []
    if any(i >= number for i in moving):
        directions_moved = [ad.instantiate_zeros(tangent) for tangent in tangents[number:]]
        parts.append(linear_p.bind(*residuals, *directions_moved, **params))
    if moving_residuals := [i for i in moving if i < number]:

        def of_residuals(*residuals):
            return map.apply(list(residuals), directions)

        moved = [tangents[i] for i in moving_residuals]
        parts.append(jvp_of_moving(of_residuals, moving_residuals, residuals, moved)[1])
    return linear_p.bind(*primals, **params), [sum(part[1:], part[0]) for part in zip(*parts, strict=True)]


def _transpose(cotangents, *operands, map, number, types, program):
    del types, program
    residuals, directions = operands[:number], operands[number:]
    given = [None if type(cotangent) is ad.Zero else cotangent for cotangent in cotangents]
    if not map.symbolic_zeros or all(cotangent is None for cotangent in given):
        given = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    gradients = map.transpose(list(residuals), given)
    wanted = [ad.is_undefined_primal(direction) for direction in directions]
    return [None] * number + [g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True)]


def _batched(axis_data, operands, axes, *, map, number, types, program):
    if all(axis is None for axis in axes):  # JAX asks then too
        return linear_p.bind(*operands, map=map, number=number, types=types, program=program), [None] * len(types)
    names = {"axis_name": axis_data.name, "axis_size": axis_data.size, "spmd_axis_name": axis_data.spmd_name}
    vmap = partial(jax.vmap, **names)
    operands = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(operands, axes, strict=True)]
    mapped = [None if axis is None else 0 for axis in axes]
    of_residuals, of_directions = mapped[:number], mapped[number:]

    def apply(residuals, directions):
        return vmap(map.apply, (of_residuals, of_directions))(residuals, directions)

    def transpose(residuals, cotangents):
        gradients = vmap(map.transpose, (of_residuals, 0))(residuals, cotangents)
        # A direction that all examples share has the sum of their gradients.
        return [g if axis == 0 else jnp.sum(g, 0) for g, axis in zip(gradients, of_directions, strict=True)]

    types = tuple(jax.make_jaxpr(lambda *o: apply([*o[:number]], [*o[number:]]))(*operands).out_avals)
    map_of_all = Map(apply, transpose, map.symbolic_zeros)
    out = linear_p.bind(*operands, map=map_of_all, number=number, types=types, program=program)
    return out, [0] * len(out)


ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.fancy_primitive_batchers[linear_p] = _batched
mlir.register_lowering(linear_p, mlir.lower_fun(_apply, multiple_results=True))
