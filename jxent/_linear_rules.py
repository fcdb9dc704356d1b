"""The derivative rules of `linear_costs` and `linear_total`: which pass computes the gradients, and what it keeps.

Coefficients are a dictionary from the name of a cost to an array of the positions' shape.
"""

from collections.abc import Iterable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jxent._core.dtypes import compute_dtype
from jxent._core.forward_mode import jvp_of_moving, with_forward_mode
from jxent._core.shards import scaled, shared_cotangent
from jxent._core.weights import weigh
from jxent._mesh.auto import depends_on_devices
from jxent._mesh.sharded import sharded
from jxent._rows.costs import STATISTIC_NAMES
from jxent._sweep.block import Gradients, Inputs, Sweep, Swept
from jxent._sweep.sweep import Coefficients


def _values(primals: Any) -> tuple[Any, Any]:
    """(values, differentiated) of a forward rule's arguments, as `symbolic_zeros` gives them.

    `differentiated` has an empty array for each input, of the input's dtype. It has one axis if the input is
    differentiated, and two if not. JAX may use the tree structure of one call's residuals for another's. So only shapes
    can tell which inputs are differentiated.
    """
    values = jax.tree.map(lambda a: a.value, primals)
    return values, jax.tree.map(lambda a: jnp.zeros((0,) if a.perturbed else (0, 0), a.value.dtype), primals)


def _names(differentiated: Inputs) -> tuple[str, ...]:
    """The names of the inputs that are differentiated."""
    markers = {name: differentiated.array(name) for name in Inputs._fields}
    return tuple(name for name, marker in markers.items() if marker is not None and marker.ndim == 1)


def _gradients(differentiated: Inputs, gradients: Gradients, factor: Array | None = None) -> Inputs:
    """The gradients as `Inputs`, each in its input's dtype and times a factor; None for an input without one."""
    out: dict[str, Any] = dict.fromkeys(Inputs._fields)
    for name in _names(differentiated):
        like, gradient = differentiated.array(name), gradients[name]
        gradient = gradient if factor is None else scaled(gradient.astype(compute_dtype(like.dtype)), factor)
        out[name] = gradient.astype(like.dtype)
    if differentiated.labels is not None:
        out["labels"] = differentiated.labels.gradient(out["labels"])
    return Inputs(**out)


# --- the costs of each position: a second sweep computes the gradients, in the backward pass --------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_costs(sweep: Sweep, inputs: Inputs) -> Swept:
    """The costs of each position, the statistics among them, and the prediction."""
    return sharded(sweep, (), inputs, {})[0]


def _linear_costs_fwd(sweep: Sweep, primals: Any) -> tuple[Swept, tuple[Inputs, Inputs]]:
    inputs, differentiated = _values(primals)
    objective, rows = sweep.objective, None
    if _takes_rows(sweep, inputs, ()):
        (costs, prediction), _ = sharded(sweep._replace(objective=objective.returning_rows()), (), inputs, {})
        rows = {name: lax.stop_gradient(costs[name]) for name in costs if name not in objective.names}
        out = Swept(costs={name: costs[name] for name in objective.names}, prediction=prediction)
    else:
        out = sharded(sweep, (), inputs, {})[0]
    indices = objective.known_indices(inputs.indices, out.prediction)
    return out, (inputs._replace(indices=indices, rows=rows), differentiated)


def _takes_rows(sweep: Sweep, inputs: Inputs, costs: Iterable[str]) -> bool:
    """Whether the sweep for the gradients of these costs takes rows from the sweep for the costs.

    It does if it multiplies in 16 bits. These round a gradient more than the logits, which are computed again. With
    class weights in sums over the classes, the gradient needs further sums, and so the logits in memory.
    """
    in_16_bits = jnp.promote_types(inputs.hidden.dtype, inputs.kernel.dtype).itemsize == 2
    alone = in_16_bits and inputs.class_weight is None
    return alone and sweep.objective.takes_rows(inputs.labels, inputs.temperature, costs)


# The gradient is that of the sum of cotangent[i] * cost[i]. So the cotangents are the coefficients of the sweep.
def _linear_costs_bwd(sweep: Sweep, residuals: tuple[Inputs, Inputs], cotangents: Any) -> tuple[Inputs]:
    inputs, differentiated = residuals
    return (_gradients_of_costs(sweep, inputs, differentiated, cotangents[0]),)


def _gradients_of_costs(sweep: Sweep, inputs: Inputs, differentiated: Inputs, cotangents: Any) -> Inputs:
    """The gradients of the costs that have a cotangent."""
    coefficients = {name: cotangent for name, cotangent in cotangents.items() if cotangent is not None}
    coefficients = shared_cotangent(coefficients, sweep.objective.shards)
    return _gradients(differentiated, _gradients_unless_zero(sweep, _names(differentiated), inputs, coefficients))


def _gradients_unless_zero(sweep: Sweep, wrt: tuple[str, ...], inputs: Inputs, coefficients: Coefficients) -> Gradients:
    """The gradients of a sweep that masks the positions whose coefficients are all 0, and so skips them.

    Derivatives of the gradients by such a coefficient are not 0, so tangents come from a sweep over all positions.
    Dense label probabilities are an exception: to skip positions, a sweep would have to copy a block of them.
    """
    if inputs.rows is not None and ("bias" in wrt or not _takes_rows(sweep, inputs, coefficients)):
        inputs = inputs._replace(rows=None)  # the gradient by a bias reads the gradient of the logits in float32
    if inputs.mask is None and inputs.labels is not None and inputs.labels.dense is not None:
        return sharded(sweep, wrt, inputs, coefficients)[1]
    leaves, tree = jax.tree.flatten((inputs, coefficients))

    def of_all(*leaves: Array) -> Gradients:
        inputs, coefficients = tree.unflatten(leaves)
        return sharded(sweep, wrt, inputs._replace(rows=None), coefficients)[1]

    @jax.custom_jvp
    def of_some(*leaves: Array) -> Gradients:
        inputs, coefficients = tree.unflatten(leaves)
        entries = sweep.objective.entries
        used = reduce(
            jnp.logical_or, (jnp.any(c != 0, -1) if entries(name) else c != 0 for name, c in coefficients.items())
        )
        mask = used if inputs.mask is None else inputs.mask & used
        return sharded(sweep, wrt, inputs._replace(mask=mask), coefficients)[1]

    def jvp(primals: Any, tangents: Any) -> tuple[Gradients, Gradients]:
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]
        moved = jvp_of_moving(of_all, moving, primals, [tangents[i] for i in moving])[1]
        return of_some(*primals), moved

    of_some.defjvp(jvp, symbolic_zeros=True)
    return of_some(*leaves)


def _linear_costs_tangent(sweep: Sweep, residuals: tuple[Inputs, Inputs], tangents: Inputs) -> dict[str, Array]:
    inputs, _ = residuals
    return _tangents_of_costs(sweep, inputs, tangents)


def _tangents_of_costs(sweep: Sweep, inputs: Inputs, tangents: Inputs) -> dict[str, Array]:
    """The tangents, by a sweep whose blocks push tangents through their logits to their costs."""
    inputs = inputs._replace(rows=None)
    of_names = {name: tangents.array(name) for name in Inputs._fields}
    of_moving = {name: tangent for name, tangent in of_names.items() if tangent is not None}
    sweep = sweep._replace(pushes_tangents=True)

    def costs(moving: dict[str, Array]) -> dict[str, Array]:
        return sharded(sweep, (), inputs.with_arrays(moving), {})[0].costs

    return jax.jvp(costs, ({name: inputs.array(name) for name in of_moving},), (of_moving,))[1]


_linear_costs.defvjp(_linear_costs_fwd, _linear_costs_bwd, symbolic_zeros=True)
linear_costs = with_forward_mode(_linear_costs, _linear_costs_tangent, True, depends_on_devices)


# --- their total: one sweep computes it and its gradients, which are kept for the backward pass -----------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_total(sweep: Sweep, inputs: Inputs, coefficients: Coefficients) -> tuple[Any, Array | None]:
    """((the sum of the costs with these coefficients, the statistics), the prediction)."""
    costs, prediction = sharded(sweep, (), inputs, {})[0]
    return _total_and_statistics(coefficients, costs), prediction


def _total_and_statistics(coefficients: Coefficients, costs: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    return jnp.sum(weigh(coefficients, costs)), {name: costs[name] for name in costs if name not in coefficients}


class Residuals(NamedTuple):
    inputs: Inputs  # for tangents, and for the gradients of the statistics
    differentiated: Inputs  # as of `_values`
    gradients: dict[str, Any]  # of the total, for each input; an empty array if the input is not differentiated
    coefficients: dict[str, Array]
    costs: dict[str, Array]  # the costs in the total


def _linear_total_fwd(sweep: Sweep, primals: Any, coefficients: Any) -> tuple[Any, Residuals]:
    inputs, differentiated = _values(primals)
    coefficients = jax.tree.map(lambda c: c.value, coefficients)
    (costs, prediction), gradients = sharded(sweep, _names(differentiated), inputs, coefficients)
    markers = {name: differentiated.array(name) for name in Inputs._fields}
    residuals = Residuals(
        inputs=inputs,
        differentiated=differentiated,
        gradients={name: gradients.get(name, marker) for name, marker in markers.items() if marker is not None},
        coefficients=coefficients,
        costs={name: costs[name] for name in coefficients},
    )
    return (_total_and_statistics(coefficients, costs), prediction), residuals


# With coefficients c and costs of the inputs x, total = sum of c[i] cost[i](x). So d total / dx is the sweep's gradient
# for these coefficients, and the cotangent only multiplies it; d total / dc[i] = cost[i]. If statistics have
# cotangents, a second sweep computes their gradients.
def _linear_total_bwd(sweep: Sweep, residuals: Residuals, cotangents: Any) -> tuple[Inputs, Coefficients]:
    to_total, to_statistics = cotangents[0]
    _, pull = jax.vjp(lambda c: jnp.sum(weigh(c, residuals.costs)), residuals.coefficients)
    parts = []
    if to_total is not None:
        factor = shared_cotangent(to_total, sweep.objective.shards)
        parts.append(_gradients(residuals.differentiated, residuals.gradients, factor))
    if any(cotangent is not None for cotangent in to_statistics.values()):
        parts.append(_gradients_of_costs(sweep, residuals.inputs, residuals.differentiated, to_statistics))
    if to_total is None:
        to_total = jnp.zeros((), jax.eval_shape(weigh, residuals.coefficients, residuals.costs).dtype)
    return jax.tree.map(lambda *each: sum(each[1:], each[0]), *parts), pull(to_total)[0]


# The tangent does not use the gradients that are kept: the gradients of such a tangent would add numbers that cancel.
def _linear_total_tangent(
    sweep: Sweep, residuals: Residuals, of_inputs: Inputs, of_coefficients: Any
) -> tuple[Array, dict[str, Array]]:
    coefficients = {name: c for name, c in of_coefficients.items() if c is not None}
    of_costs = {}
    if jax.tree.leaves(of_inputs):
        of_costs = _tangents_of_costs(sweep, residuals.inputs, of_inputs)
    tangents = {
        "costs": {name: of_costs[name] for name in residuals.costs if name in of_costs},
        "coefficients": coefficients,
    }

    def weighed(moving: Any) -> Array:
        return jnp.sum(weigh(residuals.coefficients | moving["coefficients"], residuals.costs | moving["costs"]))

    at = {part: {name: getattr(residuals, part)[name] for name in moving} for part, moving in tangents.items()}
    of_total = jax.jvp(weighed, (at,), (tangents,))[1]
    still = jnp.zeros_like(next(iter(residuals.costs.values())))
    names = STATISTIC_NAMES if sweep.objective.stats else ()
    return of_total, {name: of_costs.get(name, still) for name in names}


_linear_total.defvjp(_linear_total_fwd, _linear_total_bwd, symbolic_zeros=True)
linear_total = with_forward_mode(_linear_total, _linear_total_tangent, True, depends_on_devices)
