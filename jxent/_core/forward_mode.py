"""Forward mode for the functions whose gradients are `custom_vjp` rules.

JAX refuses to push tangents through a `custom_vjp`. So this file wraps each rule in a `custom_jvp`. The tangents come
from one linear primitive. Evaluated, the primitive is the rule's tangent formula, and transposed, the rule's `bwd`.
`jax.jvp` evaluates it and `jax.grad` transposes it, both with the residuals of the rule's `fwd`. So a gradient costs
the same as with the `custom_vjp` alone.

For further derivatives JAX differentiates the code of `fwd`, `bwd` and the tangent formula, also by the residuals.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar

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


def with_forward_mode(
    rule: Any, tangent: Callable[..., Any], symbolic_zeros: bool = False, program: Callable[[], Any] | None = None
) -> Callable[..., Any]:
    """`rule`, with forward-mode derivatives too.

    `rule` is a `custom_vjp` function of (static, *arguments), trees of arrays. It returns a pair (results with
    gradients, results without). `symbolic_zeros` is the option of the rule's `defvjp`.

    ``tangent(static, residuals, *tangents)`` returns the tangents of the results with gradients. It is linear in the
    arguments' tangents, which are None for constant arrays. The rule's `bwd` gets None for a cotangent of 0, unless all
    are 0. `program` returns the `program` of `linear`.
    """

    @partial(jax.custom_jvp, nondiff_argnums=(0,))
    @wraps(rule)
    def function(static: Any, *primals: Any) -> Any:
        return mapped_with(rule(static, *primals), primals)

    def jvp(static: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
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

        def apply(kept: Sequence[Any], directions: Sequence[Any]) -> Sequence[Any]:
            every = [None] * tree.num_leaves
            for i, direction in zip(moving, directions, strict=True):
                every[i] = direction
            moved = tangent(static, kept_tree.unflatten(kept), *tree.unflatten(every))
            return tree_of_differentiable.flatten_up_to(moved)

        def transpose(kept: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
            gradients = rule.bwd(static, kept_tree.unflatten(kept), out_tree.unflatten([*cotangents, *still]))
            gradients = tree.flatten_up_to(gradients)
            return [gradients[i] for i in moving]

        along, of_devices = [directions[i] for i in moving], program and program()
        moved = linear(apply, transpose, kept, along, differentiable, of_devices, symbolic_zeros=True)
        return out, out_tree.unflatten([*moved, *still])

    function.defjvp(jvp, symbolic_zeros=True)
    return function


def in_one_piece(function: Callable[..., T], plain: Callable[..., T], *operands: Any) -> T:
    """``function(*operands)``, which JAX does not take apart when it separates values from tangents.

    JAX would look for values that are constant in a loop of the function, and so lose the `custom_jvp` rules in the
    loop. `plain` returns the same results by operations that have a transpose. JAX uses `plain` for gradients and under
    `jax.vmap`, and `function` for tangents of any order.
    """
    leaves, tree = jax.tree.flatten(operands)
    structures = []  # of the results, known once the function has been traced

    def flat(function: Callable[..., Any]) -> Callable[..., Any]:
        def in_one_piece(*leaves: Array) -> Sequence[Any]:  # a name that jaxprs show
            out, structure = jax.tree.flatten(function(*tree.unflatten(leaves)))
            structures.append(structure)
            return out

        return in_one_piece

    of_leaves = flat(function)
    out = _in_one_piece(of_leaves, of_leaves if plain is function else flat(plain), leaves)
    return structures[0].unflatten(out)


def _in_one_piece(function: Callable[..., Any], plain: Callable[..., Any], leaves: Sequence[Any]) -> Sequence[Any]:
    def jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]
        along = [tangents[i] for i in moving]
        if function is plain:
            out, moved = jvp_of_moving(function, moving, primals, along)
            return mapped_with(out, primals), moved
        out = rule(*primals)
        floats = [i for i, array in enumerate(out) if jnp.issubdtype(array.dtype, jnp.floating)]

        def pushed(function: Callable[..., Any], *both: Array) -> Sequence[Any]:
            at, directions = both[: len(primals)], both[len(primals) :]
            moved = jvp_of_moving(function, moving, at, directions)[1]
            return [moved[i] for i in floats]

        def apply(primals: Any, directions: Sequence[Any]) -> Sequence[Any]:
            return _in_one_piece(partial(pushed, function), partial(pushed, plain), [*primals, *directions])

        def transpose(primals: Any, cotangents: Sequence[Any]) -> Sequence[Any]:
            moved = partial(pushed, plain, *primals)
            return jax.linear_transpose(moved, *(primals[i] for i in moving))(cotangents)

        moved = iter(linear(apply, transpose, primals, along, [out[i] for i in floats]))
        still = [zero_from_primal(array, symbolic_zeros=True) for array in out]
        return out, [next(moved) if i in floats else still[i] for i in range(len(out))]

    value = function if function is plain else plain_under_vmap(function, plain)
    rule = jax.custom_jvp(lambda *primals: mapped_with(value(*primals), primals))
    rule.defjvp(jvp, symbolic_zeros=True)
    return rule(*leaves)


def plain_under_vmap(function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but `plain` under `jax.vmap`. Both take arrays and return a list of arrays."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def _(size: int, is_mapped: Any, *arrays: Array) -> tuple[Any, Any]:
        out = jax.vmap(plain, [0 if each else None for each in is_mapped], axis_size=size)(*arrays)
        return out, [True] * len(out)

    return mapped


def jvp_of_moving(
    function: Callable[..., Any], moving: Sequence[int], arrays: Sequence[Any], tangents: Any
) -> tuple[Any, Any]:
    """(``function(*arrays)``, its tangents). The arrays with the numbers `moving` have these tangents."""

    def of_moving(*moved: Array) -> Any:
        every = dict(enumerate(arrays)) | dict(zip(moving, moved, strict=True))
        return function(*every.values())

    return jax.jvp(of_moving, [arrays[i] for i in moving], list(tangents))


@jax.custom_jvp
def moving_where(mask: Array, array: Array) -> Array:
    """The array, as a constant for differentiation where the mask is False."""
    return mapped_with(array, mask)


@moving_where.defjvp
def _moving_where_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return moving_where(*primals), only(primals[0], tangents[1])


# --- a value that `jax.vmap` maps wherever it maps its tangent --------------------------------------------------------


def mapped_with(values: T, operands: Any) -> T:
    """The values, trees of arrays, which `jax.vmap` maps if it maps any of the operands.

    Use this on the values of a `custom_jvp` function. If the tangent takes an operand that the value ignores, such as a
    mask, `jax.vmap` over that operand would map only the tangent. JAX then raises, or returns wrong numbers. The
    compiled program contains nothing of this.
    """
    leaves, tree = jax.tree.flatten(values)
    return tree.unflatten(mapped_with_p.bind(*leaves, *jax.tree.leaves(operands), number=len(leaves)))


mapped_with_p = Primitive("jxent_mapped_with")
mapped_with_p.multiple_results = True


@mapped_with_p.def_impl
def _values(*operands: Any, number: int) -> Sequence[Any]:
    return list(operands[:number])


@mapped_with_p.def_abstract_eval
def _types_of_values(*operands: Any, number: int) -> Sequence[Any]:
    return list(operands[:number])


def _jvp_of_values(primals: Any, tangents: Any, *, number: int) -> tuple[Any, Any]:
    return mapped_with_p.bind(*primals, number=number), tangents[:number]


def _transpose_of_values(cotangents: Sequence[Any], *operands: Any, number: int) -> Sequence[Any]:
    return [*cotangents, *[None] * (len(operands) - number)]


def _map_values(axis_data: Any, operands: Any, axes: Any, *, number: int) -> tuple[Any, Any]:
    at = next((i for i, axis in enumerate(axes) if axis is not None), None)
    if at is None:
        return mapped_with_p.bind(*operands, number=number), [None] * number
    names = {"axis_name": axis_data.name, "axis_size": axis_data.size, "spmd_axis_name": axis_data.spmd_name}

    def value_of_each(value: Array, axis: int | None) -> Array:
        return value if axis is not None else jax.vmap(lambda _: value, (axes[at],), **names)(operands[at])

    values = [value_of_each(*pair) for pair in zip(operands[:number], axes, strict=False)]
    # The primitive is bound again, because a `jax.vmap` around this one may map other operands.
    return mapped_with_p.bind(*values, *operands[number:], number=number), [axis or 0 for axis in axes[:number]]


ad.primitive_jvps[mapped_with_p] = _jvp_of_values
ad.primitive_transposes[mapped_with_p] = _transpose_of_values
batching.fancy_primitive_batchers[mapped_with_p] = _map_values
mlir.register_lowering(mapped_with_p, mlir.lower_fun(_values, multiple_results=True))


# --- the primitive of tangents ----------------------------------------------------------------------------------------


class Map(NamedTuple):
    """A linear map of directions and its transpose, a map of cotangents. Both also take residuals."""

    apply: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
    transpose: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
    symbolic_zeros: bool  # whether `transpose` takes None for a cotangent of 0, if others are not


linear_p = Primitive("jxent_linear")
linear_p.multiple_results = True
# Before lowering, JAX rewrites a primitive whose program has custom rules of the new kinds (`jax_custom_jvp3`,
# `jax_custom_vjp3`), and needs a rule for the rewrite. This primitive can skip the rewrite, because its operands are
# arrays and lowering traces its program again.
linear_p.is_high = lambda *_, **__: False


def linear(
    apply: Callable[..., Any],
    transpose: Callable[..., Any],
    residuals: Sequence[Any],
    directions: Sequence[Any],
    like: Sequence[Any],
    program: Any = None,
    symbolic_zeros: bool = False,
) -> Sequence[Any]:
    """``apply(residuals, directions)`` with the given transpose. Results have the types of `like`.

    JAX traces `apply` when it evaluates the tangents, which a gradient does not need. The lowering may depend on more
    than the operands. JAX sees this if a `program` with the same dependencies is given.
    """
    config, axes = traced_config(), [varying(array) for array in like]

    def alike(residuals: Sequence[Any], directions: Sequence[Any]) -> Sequence[Any]:
        with config():
            return [cast(*result) for result in zip(apply(residuals, directions), axes, strict=True)]

    types = tuple(jax.typeof(array) for array in like)
    map = Map(apply=alike, transpose=transpose, symbolic_zeros=symbolic_zeros)
    return linear_p.bind(*residuals, *directions, map=map, number=len(residuals), types=types, program=program)


@linear_p.def_impl
def _apply(*operands: Any, map: Any, number: int, types: Any, program: Any) -> Sequence[Any]:
    del types, program
    return map.apply(list(operands[:number]), list(operands[number:]))


@linear_p.def_abstract_eval
def _types(*operands: Any, map: Any, number: int, types: Any, program: Any) -> Any:
    del operands, map, number, program
    return types


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    """The sum of two parts, one for the tangents of the residuals and one for the tangents of the directions."""
    map, number = params["map"], params["number"]
    residuals, directions = list(primals[:number]), list(primals[number:])
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]
    parts = []
    if any(i >= number for i in moving):
        directions_moved = [ad.instantiate_zeros(tangent) for tangent in tangents[number:]]
        parts.append(linear_p.bind(*residuals, *directions_moved, **params))
    if moving_residuals := [i for i in moving if i < number]:

        def of_residuals(*residuals: Array) -> Sequence[Any]:
            return map.apply(list(residuals), directions)

        moved = [tangents[i] for i in moving_residuals]
        parts.append(jvp_of_moving(of_residuals, moving_residuals, residuals, moved)[1])
    return linear_p.bind(*primals, **params), [sum(part[1:], part[0]) for part in zip(*parts, strict=True)]


def _transpose(
    cotangents: Sequence[Any], *operands: Any, map: Any, number: int, types: Any, program: Any
) -> Sequence[Any]:
    del types, program
    residuals, directions = operands[:number], operands[number:]
    given = [None if type(cotangent) is ad.Zero else cotangent for cotangent in cotangents]
    if not map.symbolic_zeros or all(cotangent is None for cotangent in given):
        given = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    gradients = map.transpose(list(residuals), given)
    wanted = [ad.is_undefined_primal(direction) for direction in directions]
    return [None] * number + [g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True)]


def _batched(
    axis_data: Any, operands: Any, axes: Any, *, map: Any, number: int, types: Any, program: Any
) -> tuple[Any, Any]:
    if all(axis is None for axis in axes):  # JAX calls this rule then too
        return linear_p.bind(*operands, map=map, number=number, types=types, program=program), [None] * len(types)
    names = {"axis_name": axis_data.name, "axis_size": axis_data.size, "spmd_axis_name": axis_data.spmd_name}
    vmap = partial(jax.vmap, **names)
    operands = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(operands, axes, strict=True)]
    mapped = [None if axis is None else 0 for axis in axes]
    of_residuals, of_directions = mapped[:number], mapped[number:]

    def apply(residuals: Sequence[Any], directions: Sequence[Any]) -> Sequence[Any]:
        return vmap(map.apply, (of_residuals, of_directions))(residuals, directions)

    def transpose(residuals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
        gradients = vmap(map.transpose, (of_residuals, 0))(residuals, cotangents)
        # If all examples share a direction, its gradient is the sum over the examples.
        return [g if axis == 0 else jnp.sum(g, 0) for g, axis in zip(gradients, of_directions, strict=True)]

    types = tuple(jax.make_jaxpr(lambda *o: apply([*o[:number]], [*o[number:]]))(*operands).out_avals)
    map_of_all = Map(apply=apply, transpose=transpose, symbolic_zeros=map.symbolic_zeros)
    out = linear_p.bind(*operands, map=map_of_all, number=number, types=types, program=program)
    return out, [0] * len(out)


ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.fancy_primitive_batchers[linear_p] = _batched
mlir.register_lowering(linear_p, mlir.lower_fun(_apply, multiple_results=True))
