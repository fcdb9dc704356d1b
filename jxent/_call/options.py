"""The options of a loss, static or traced, and the arrays that the loss takes besides logits and labels."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Bool, Float

from jxent._call import checks
from jxent._call.axis_names import Over
from jxent._core.dtypes import compute_dtype
from jxent._core.shards import AxisNames
from jxent._labels.labels import Labels
from jxent._objective.cross_entropy import CrossEntropy
from jxent._objective.objective import Objective
from jxent._rows.costs import Scalars


class Options(NamedTuple):
    """The static part of a call."""

    function: str  # this and `argument`: the names of the public function and its first argument, for reports
    argument: str
    objective: Objective
    scalars: tuple[tuple[str, float], ...]  # made by `static_of`
    ignore_index: int | None  # None ignores no label
    reduction: str
    batch_axis_name: AxisNames


class Weights(NamedTuple):
    """The arrays of a call besides logits (or hidden states) and labels; None for an array that is not given."""

    class_weight: Float[Array, " classes"] | None
    sample_weight: Float[Array, "*#positions"] | None
    where: Bool[Array, "*#positions"] | None
    scalars: dict[str, Array]  # those of `Scalars` that are traced
    temperature: Float[Array, "*#positions"] | None = None  # a scalar, or by position; None for 1


def static_of(scalars: Scalars) -> tuple[tuple[str, float], ...]:
    """The names and values of the scalars that are Python numbers, and therefore static."""
    return tuple((name, value) for name, value in scalars._asdict().items() if isinstance(value, float))


def traced_of(scalars: Scalars) -> dict[str, Array]:
    """The scalars that are traced, by name."""
    return {name: value for name, value in scalars._asdict().items() if not isinstance(value, float)}


def scalars_of(options: Options, weights: Weights) -> Scalars:
    """All of the `Scalars`, static or traced."""
    return Scalars(**(dict(options.scalars) | weights.scalars))


def options_of(
    function: str,
    argument: str,
    *,
    objective: Objective,
    over: Over,
    scalars: Scalars,
    reduction: object,
    ignore_index: int | None = None,
) -> Options:
    """The `Options` of a call whose `scalars` are static or traced."""
    return Options(
        function=function,
        argument=argument,
        objective=objective,
        scalars=static_of(scalars),
        ignore_index=ignore_index,
        reduction=checks.reduction(function, reduction),
        batch_axis_name=over.batch,
    )


def cross_entropy_options(
    function: str,
    argument: str,
    *,
    axis: int,
    labels: Labels,
    over: Over,
    scalars: Scalars,
    logit_softcap: object,
    ignore_index: object,
    reduction: object,
    return_stats: object,
) -> Options:
    """The `Options` of `cross_entropy` and `linear_cross_entropy`."""
    objective = CrossEntropy(
        axis=axis,
        shards=over.shards,
        logit_softcap=checks.softcap(function, logit_softcap),
        costs=CrossEntropy.wanted(scalars),
        stats=checks.flag(function, "return_stats", return_stats),
    )
    ignored = checks.ignored_class(function, ignore_index, labels)
    return options_of(
        function, argument, objective=objective, over=over, scalars=scalars, reduction=reduction, ignore_index=ignored
    )


def divergence_weights(
    function: str,
    temperature: object,
    sample_weight: object,
    where: object,
    logits: checks.Shaped,
    axis: int,
    *others: Array,
) -> Weights:
    """The `Weights` of a divergence. It reads the shape and dtype of `logits`, and the dtypes of `others`."""
    dtype = compute_dtype(logits.dtype, *(other.dtype for other in others))
    of_positions = checks.temperature(function, temperature, logits, axis, dtype)
    _, sample_weight, where = checks.weights(function, None, sample_weight, where, logits, axis)
    return Weights(class_weight=None, sample_weight=sample_weight, where=where, scalars={}, temperature=of_positions)
