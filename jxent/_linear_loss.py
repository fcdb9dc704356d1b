"""A loss by one sweep over blocks of positions, which takes its gradients too, or by two."""

import jax
import jax.numpy as jnp

from jxent._core.passes import compute_dtype
from jxent._core.shards import cast_alike, total
from jxent._core.weights import only, weigh
from jxent._linear_rules import linear_costs, linear_total
from jxent._loss.positions import reduced
from jxent._sweep.sweep import Inputs


def loss_by_sweep(options, sweep, recompute, inputs: Inputs, coefficients, weight):
    """(the loss, the costs of each position that it has not summed, the prediction).

    The coefficients, by the names of the costs, are as of `coefficients_of`; `weight` is the mean's denominator.
    """
    if options.reduction == "none" or recompute:
        inputs, _ = _cast_alike(options, inputs, {})
        costs, prediction = linear_costs(sweep, inputs)
        return reduced(options, weigh(coefficients, costs), weight), costs, prediction
    # Divided by the denominator before the sweep: what is kept for the backward pass is then the gradient itself.
    divisor = jnp.where(weight == 0, 1, weight) if options.reduction == "mean" else 1
    shape, dtype = inputs.hidden.shape[:-1], weight.dtype
    coefficients = {name: _full(c, inputs.keep, shape, dtype) / divisor for name, c in coefficients.items()}
    inputs, coefficients = _cast_alike(options, inputs, coefficients)
    (loss, costs), prediction = linear_total(sweep, inputs, coefficients)
    loss = total(loss, options.batch_axis_name)
    loss = jnp.where(weight == 0, jnp.nan, loss) if options.reduction == "mean" else loss
    return loss, costs, prediction


def _full(coefficient, keep, shape, dtype):
    """A coefficient, None standing for 1, at each position that counts and 0 elsewhere, in at least `dtype`."""
    if isinstance(coefficient, jax.Array):
        dtype = compute_dtype(coefficient.dtype, dtype)
    return only(keep, jnp.broadcast_to(jnp.asarray(1 if coefficient is None else coefficient, dtype), shape))


def _cast_alike(options, inputs, coefficients):
    """(inputs, coefficients), as `cast_alike` casts them."""
    of_classes = inputs._asdict()
    labels, of_positions = of_classes.pop("labels"), {name: of_classes.pop(name) for name in ("keep", "indices")}
    labels, of_classes, (of_positions, coefficients) = cast_alike(
        options.form.shards, labels, of_classes, (of_positions, coefficients)
    )
    return Inputs(labels=labels, **of_positions, **of_classes), coefficients
