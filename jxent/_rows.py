"""What one row of logits comes down to: its maximum and the logarithm of its normalizer, exactly.

With the row maximum m = max x and r = sum of exp(x[j] - m) over every class but the one at the maximum,

    log_z = log1p(r)                       # log sum exp(x - m)
    log p[j] = (x[j] - m) - log_z          # both terms <= 0: nothing cancels
    p[j] - 1 = expm1(log p[j])

`m` and `log_z` stay apart, because their sum would round at |m| >> 1. Where the label is known its class may be left
out instead of the maximum's, with d = x[label] - m: log_z = log1p(sum over j != label of exp(x[j] - m) + expm1(d)).

Everything is computed in float32 (float64 for float64 logits), and no array of the logits' size is written, unless
the caller has room for it: then a CPU takes the exponentials once and keeps them, because they cost it more than
memory; elsewhere each pass takes them anew (`_passes`). But of float16 logits XLA:CPU writes a float32 copy: it fuses
the upcast of bfloat16 with a sum, not that of float16.

A "row" array has the logits' shape with size 1 along the class axes. Where the classes are sharded over `axis_name`
(`_shards`), each sum over classes and each maximum is one over the shards too: of row arrays, nothing larger.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from jxent._passes import barrier, blockable, blocks_in, class_sum, on_cpu, own_sum, partial_sums
from jxent._shards import by_compiler, largest, total


def compute_dtype(*dtypes):
    """At least float32, and float64 if any of `dtypes` is."""
    return jnp.promote_types(jnp.result_type(*dtypes), jnp.float32)


# --- what a pass computes for each logit ------------------------------------------------------------------------------


def _most(unit):
    """The largest finite number."""
    return float(jnp.finfo(unit.dtype).max) * unit


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def centered(logits, top, cap, unit):
    """x - m, in the dtype of `unit`: exactly 0 at the largest logit `top`, which is a constant to differentiation.

    x is the logit, or cap * tanh(logit / cap). With a = top / cap and b = logit / cap,

        tanh(b) - tanh(a) = 2 expm1(-2 (a - b)) / ((1 + exp(-2 a)) (1 + exp(2 b)))

    which does not cancel, as the difference of two rounded tanh would.
    """
    x, top = logits.astype(unit.dtype), top.astype(unit.dtype)
    if cap is None:
        return x - top
    cap = cap * unit
    falling, rising = jnp.exp(-2 * unit * (top / cap)), jnp.exp(2 * unit * (x / cap))
    z = 2 * cap * jnp.expm1(-2 * unit * ((top - x) / cap)) / ((unit + falling) * (unit + rising))
    # The last term is 0, or -inf where x is: a masked class stays masked.
    return z + jnp.minimum(x * (0.25 * unit) + _most(unit), 0 * unit)


@centered.defjvp
def _centered_jvp(cap, primals, tangents):
    logits, top, unit = primals[0], *lax.stop_gradient(primals[1:])
    z = centered(logits, top, cap, unit)
    dz = tangents[0].astype(z.dtype)
    if cap is not None:
        # 1 - tanh(u)**2 cancels where the cap saturates; 1 / cosh(u)**2 does not.
        e = jnp.exp(-2 * jnp.abs(logits.astype(z.dtype) / cap))
        dz = 4 * e / (1 + e) ** 2 * dz
    return z, dz


def unmasked(logits, unit):
    """1, and 0 where a logit is -inf."""
    x = logits.astype(unit.dtype)
    return lax.stop_gradient(jnp.minimum(jnp.maximum(x * (0.25 * unit) + _most(unit), 0 * unit), unit))


def below_max(logits, top, unit):
    """0 at the largest logit of a row and 1 below it; `top` is a row array."""
    distance = top.astype(unit.dtype) - logits.astype(unit.dtype)
    return lax.stop_gradient(jnp.minimum(distance * (_most(unit) / 4), unit))


def product(weight, cost, unit):
    """weight * cost for a cost in [0, inf], with 0 * inf = 0."""
    finite = jnp.minimum(cost, _most(unit))
    sign = jnp.maximum(jnp.minimum(weight * _most(unit), unit), -unit)
    # The largest finite number where the cost is infinite and the weight is not 0, which four times is infinite.
    excess = lax.stop_gradient(sign * ((unit - unmasked(-cost, unit)) * finite))
    return weight * finite + (4 * unit) * excess


def class_indices(logits, axis):
    """0, 1, 2, ... along the class axis and 1 along the others, from memory: faster than counting in each row."""
    shape = [size if a == axis else 1 for a, size in enumerate(logits.shape)]
    return barrier(lax.broadcasted_iota(jnp.int32, shape, axis))


def label_logit(logits, labels, axis, axis_name=()):
    """The logit of each row's label. `labels` is a row array, counted from this shard's first class."""
    if not axis_name:
        return pick(logits, labels, axis)
    inside = jnp.clip(labels, 0, logits.shape[axis] - 1)
    return total(jnp.where(labels == inside, pick(logits, inside, axis), 0), axis_name)


def pick(logits, labels, axis):
    """The logit of each row's label (a row array of class indices in range)."""
    spec = [*jax.typeof(logits).sharding.spec]
    spec[axis] = None
    return by_compiler(partial(jnp.take_along_axis, axis=axis, mode="clip"), PartitionSpec(*spec), logits, labels)


# --- the normalizer ---------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Row arrays. To differentiation `top` is a constant."""

    top: Array  # the largest logit, upcast; 0 in a row of -inf, so that x - m is not NaN
    log_z: Array  # log sum exp(x - m); 0 in a row of -inf, so that p = 0 there
    log_normalizer: Array  # log sum exp x
    exp: Array | None  # of the logits' shape: exp(x - m), but 0 at a label that is left out; None unless there is room


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5, 6))
def normalizer(logits, label, axis, cap, dtype, room=False, axis_name=()):
    """The `Rows` of the logits.

    `label` is the class to leave out of the sum and its logit, both row arrays; or None to leave out the maximum, which
    gives log_z itself full relative precision and not only the loss log_z - (x[label] - m). With `room` for an array of
    the logits' size the exponentials are taken once and kept; without they are taken anew in each pass.
    """
    # The maximum before the upcast, which the next pass would share.
    initial = -jnp.inf if 0 in logits.shape else None
    top = largest(jnp.max(logits, axis, keepdims=True, initial=initial), axis_name).astype(dtype)
    empty = top == -jnp.inf
    top = jnp.where(empty, 0, top)
    unit = jnp.ones((), dtype)
    exp = jnp.exp(centered(logits, top, cap, unit)) if room else None
    if label is not None:
        index, logit = label
        d = centered(logit, top, cap, unit)
        if exp is not None:
            exp = jnp.where(class_indices(exp, *axis) == index, 0, exp)
            others = own_sum(total(jnp.sum(exp, axis, keepdims=True), axis_name))
        else:
            others = _without_label(logits, top, d, index, cap, axis, axis_name)
        rest = others + jnp.expm1(d)
    else:
        if exp is not None:
            all_terms = own_sum(total(jnp.sum(exp, axis, keepdims=True), axis_name))

            def below_one(exp, unit):
                # Where the sum is below 1.5, the maximum alone has an exponential of 1.
                return exp * jnp.minimum((unit - exp) * (_most(unit) / 4), unit)

            below = class_sum(below_one, all_terms, (exp,), (), axis, axis_name)
        else:

            def term(x, top, unit):
                return jnp.exp(centered(x, top, cap, unit))

            def below_top(x, top, unit):
                return term(x, top, unit) * below_max(x, top, unit)

            all_terms = class_sum(term, top, (logits,), (top,), axis, axis_name)
            below = class_sum(below_top, all_terms, (logits,), (top,), axis, axis_name)
        # Where the sum is at least 1.5, 1 can be taken off it; where it is not, the maximum is unique.
        rest = jnp.where(all_terms < 1.5, below, all_terms - 1)
    empty &= rest == rest  # a maximum over shards may pass over NaN
    log_z = jnp.log1p(jnp.where(empty, 0, rest))
    m = top if cap is None else cap * jnp.tanh(top / cap)
    log_normalizer = jnp.where(m == jnp.inf, jnp.inf, m + log_z)  # where log_z is NaN
    return Rows(top, log_z, jnp.where(empty, -jnp.inf, log_normalizer), exp)


def _without_label(logits, top, previous, index, cap, axis, axis_name):
    """The sum of exp(x - m) over all classes but the label's, without a cancellation.

    A mask costs a CPU as much as the exponentials. So many classes it adds up in blocks, and the label's block anew.
    """
    (axis_,) = axis
    classes = blockable(logits, axis)
    number = blocks_in(classes) if classes > (2**15 if logits.dtype.itemsize == 2 else 2**14) else 1

    def term(x, top, unit):
        return jnp.exp(centered(x, top, cap, unit))

    def kept_term(x, top, index, unit):
        distance = lax.broadcasted_iota(unit.dtype, x.shape, axis_) - index.astype(unit.dtype)
        return term(x, top, unit) * jnp.minimum(jnp.abs(distance), unit)

    def row(cpu, previous, logits, top, index):
        if not cpu:
            return class_sum(kept_term, previous, (logits,), (top, index), axis)
        sums = partial_sums(number, term, previous, (logits,), (top,), axis)
        size = classes // number
        block = index // size
        near = block * size + lax.broadcasted_iota(
            index.dtype, (*index.shape[:axis_], size, *index.shape[axis_ + 1 :]), axis_
        )
        terms = term(pick(logits, jnp.clip(near, 0, classes - 1), axis_), top, jnp.ones((), top.dtype))
        anew = jnp.sum(jnp.where(near == index, 0, terms), axis_, keepdims=True)
        here = lax.broadcasted_iota(index.dtype, sums.shape, axis_) == block
        return jnp.sum(jnp.where(here, anew, sums), axis_, keepdims=True)

    operands = previous, logits, top, index
    return own_sum(total(on_cpu(row, *operands) if number > 1 else row(False, *operands), axis_name))


@normalizer.defjvp
def _normalizer_jvp(axis, cap, dtype, room, axis_name, primals, tangents):
    logits, label = primals
    rows = normalizer(logits, label, axis, cap, dtype, room, axis_name)
    unit = jnp.ones((), dtype)
    z, dz = jax.jvp(lambda logits: centered(logits, rows.top, cap, unit), (logits,), (tangents[0],))
    dlog_z = total(jnp.sum(jnp.exp(z - rows.log_z) * dz, axis, keepdims=True), axis_name)
    return rows, Rows(jnp.zeros_like(rows.top), dlog_z, dlog_z, rows.exp * dz if room else None)
