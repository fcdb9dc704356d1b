"""The rule of all objectives: a function from logits to costs, with its own gradients and tangents.

The residuals of an objective are kept for the backward pass, with one exception. If exponentials can replace the logits
(`Objective.exchanges_logits`), a backend with `Backend.saves_exp` keeps exponentials. Other backends keep the logits.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array

from jxent._backend.backend import Backend, RowMode
from jxent._backend.platform import by_platform
from jxent._core.forward_mode import with_forward_mode
from jxent._core.shards import each_shards_own, gradient_like, shared_cotangent
from jxent._objective.objective import Costs, Objective

Out = tuple[Costs, Array | None]
"""(the costs of each position by name, the prediction if statistics are wanted), all row arrays (see `passes`)."""


def _saves_exp(backend: Backend) -> bool:
    """The `choice` of `by_platform` for given logits, whose rows are otherwise computed by passes."""
    return backend.saves_exp


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _costs(objective: Objective, inputs: Any) -> Out:
    return each_shards_own(objective.forward(inputs, RowMode.PASSES)[0], objective.shards, inputs.class_offset)


class _Kept(NamedTuple):
    """Residuals. If exponentials can replace the logits, the residuals have neither, and the next field has one."""

    residuals: Any
    logits_or_exp: Array | None = None
    logits: Array | None = None  # besides the exponentials, for statistics that need logits


def _costs_fwd(objective: Objective, inputs: Any) -> tuple[Out, _Kept]:
    def forward(save_exp: bool, inputs: Any) -> tuple[Out, tuple[Any, Array]]:
        out, residuals = objective.forward(inputs, RowMode.SAVED_EXP if save_exp else RowMode.PASSES)
        logits_or_exp = residuals.exp if save_exp else inputs.logits
        return out, (residuals._replace(inputs=inputs.replace(logits=None), exp=None), logits_or_exp)

    inputs = inputs.without_masked()
    if objective.exchanges_logits(inputs):
        out, (residuals, logits_or_exp) = by_platform(_saves_exp, forward, inputs)
        kept = _Kept(
            residuals=residuals, logits_or_exp=logits_or_exp, logits=inputs.logits if objective.stats else None
        )
    else:
        out, residuals = objective.forward(inputs, RowMode.PASSES)
        kept = _Kept(residuals=residuals)
    return each_shards_own(out, objective.shards, inputs.class_offset), kept


def _costs_bwd(objective: Objective, kept: _Kept, cotangents: Any) -> tuple[Any]:
    inputs, of_costs = kept.residuals.inputs, cotangents[0]
    if kept.logits_or_exp is not None:
        inputs = inputs.replace(logits=kept.logits_or_exp)  # `like_inputs` reads the dtype and the sharding
    if kept.logits is not None:
        names = [name for name, cotangent in of_costs.items() if cotangent is not None]
        kept = kept._replace(logits=None) if objective.takes_p_alone(inputs, names) else kept
    gradients = _with_residuals(objective.backward, kept, shared_cotangent(of_costs, objective.shards))
    return (like_inputs(gradients, inputs),)


def _costs_tangent(objective: Objective, kept: _Kept, moving: Any) -> Costs:
    return _with_residuals(objective.tangent, kept, moving)


def _with_residuals(function: Any, kept: _Kept, operand: Any) -> Any:
    """``function(residuals, operand)`` with the residuals that `_costs_fwd` kept."""

    def of_platform(saves_exp: bool, kept: _Kept, operand: Any) -> Any:
        logits = kept.logits if saves_exp else kept.logits_or_exp
        inputs = kept.residuals.inputs.replace(logits=logits)
        return function(kept.residuals._replace(inputs=inputs, exp=kept.logits_or_exp if saves_exp else None), operand)

    if kept.logits_or_exp is None:
        return function(kept.residuals, operand)
    return by_platform(_saves_exp, of_platform, kept, operand)


def like_inputs(gradients: Any, inputs: Any) -> Any:
    """The gradients with the dtypes and shardings of the inputs; None for None."""

    def like(gradient: Array | None, array: Array) -> Array | None:
        return None if gradient is None else gradient_like(gradient.astype(array.dtype), array)

    return jax.tree.map(like, gradients, inputs, is_leaf=lambda gradient: gradient is None)


_costs.defvjp(_costs_fwd, _costs_bwd)
costs = with_forward_mode(_costs, _costs_tangent)


# --- the costs of one block of positions (`jxent._sweep`) -------------------------------------------------------------


class BlockOf(NamedTuple):
    """The static part of the costs of one block."""

    objective: Objective
    mode: RowMode


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _costs_of_block(static: BlockOf, inputs: Any) -> Out:
    """`costs` for one block of positions. The mode is given, so the residuals do not depend on the platform."""
    return _costs_of_block_fwd(static, inputs)[0]


def _costs_of_block_fwd(static: BlockOf, inputs: Any) -> tuple[Out, Any]:
    out, residuals = static.objective.forward(inputs, static.mode)
    return each_shards_own(out, static.objective.shards, inputs.class_offset), residuals


def _costs_of_block_bwd(static: BlockOf, residuals: Any, cotangents: Any) -> tuple[Any]:
    gradients = static.objective.backward(residuals, shared_cotangent(cotangents[0], static.objective.shards))
    return (like_inputs(gradients, residuals.inputs),)


def _costs_of_block_tangent(static: BlockOf, residuals: Any, moving: Any) -> Costs:
    return static.objective.tangent(residuals, moving)


_costs_of_block.defvjp(_costs_of_block_fwd, _costs_of_block_bwd)
costs_of_block = with_forward_mode(_costs_of_block, _costs_of_block_tangent)
