"""A loss by one sweep (a loop over blocks of positions), which computes its gradients too, or by two sweeps."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jxent._call.options import Options
from jxent._call.positions import reduced
from jxent._core.dtypes import compute_dtype
from jxent._core.shards import cast_alike, total
from jxent._core.weights import only, weigh
from jxent._linear_rules import linear_costs, linear_total
from jxent._rows.costs import Coefficient
from jxent._sweep.block import Inputs, Sweep
from jxent._sweep.sweep import Coefficients


def loss_by_sweep(
    options: Options,
    sweep: Sweep,
    recompute: bool,
    inputs: Inputs,
    coefficients: dict[str, Coefficient],
    weight: Float[Array, ""],
) -> tuple[Float[Array, "..."], dict[str, Array], Array | None]:
    """(the loss, the costs of each position that the sweep has not summed, the prediction).

    `coefficients_of` makes the coefficients, by the names of the costs. `weight` is the mean's denominator.
    """
    if options.reduction == "none" or recompute:
        inputs, _ = _cast_alike(options, inputs, {})
        costs, prediction = linear_costs(sweep, inputs)
        return reduced(options, weigh(coefficients, costs), weight), costs, prediction
    # Coefficients are divided by the denominator before the sweep, so that the sweep keeps the gradient itself.
    divisor = jnp.where(weight == 0, 1, weight) if options.reduction == "mean" else 1
    shape, dtype = inputs.hidden.shape[:-1], weight.dtype
    of_each = {name: _full(c, inputs.mask, shape, dtype) / divisor for name, c in coefficients.items()}
    inputs, of_each = _cast_alike(options, inputs, of_each)
    (loss, costs), prediction = linear_total(sweep, inputs, of_each)
    loss = total(loss, options.batch_axis_name)
    loss = jnp.where(weight == 0, jnp.nan, loss) if options.reduction == "mean" else loss
    return loss, costs, prediction


def _full(
    coefficient: Coefficient, mask: Bool[Array, "*positions"] | None, shape: tuple[int, ...], dtype: Any
) -> Float[Array, "*positions"]:
    """A coefficient (None stands for 1) at each unmasked position and 0 at the others, in at least `dtype`."""
    if isinstance(coefficient, jax.Array):
        dtype = compute_dtype(coefficient.dtype, dtype)
    return only(mask, jnp.broadcast_to(jnp.asarray(1 if coefficient is None else coefficient, dtype), shape))


def _cast_alike(options: Options, inputs: Inputs, coefficients: Coefficients) -> tuple[Inputs, Coefficients]:
    """(inputs, coefficients), as `cast_alike` casts them."""
    of_classes = inputs._asdict()
    names = ("mask",) if options.objective.temperature_gradient_is_a_share else ("mask", "temperature")
    labels, of_positions = of_classes.pop("labels"), {name: of_classes.pop(name) for name in names}
    labels, of_classes, (of_positions, coefficients) = cast_alike(
        options.objective.shards, labels, of_classes, (of_positions, coefficients)
    )
    return Inputs(labels=labels, **of_positions, **of_classes), coefficients
