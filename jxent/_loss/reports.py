"""What the losses report under `jax.experimental.checkify`: labels out of range, and numbers that are not finite.

`checkify.debug_check` is nothing at all elsewhere: what it looks at is dead code, which the compiler removes.
"""

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.sharding import AxisType

from jxent._core.labels import by_index, out_of_range


def report_labels(function, labels, classes):
    """An error that names a label out of range and where it is; index labels of positions that do not count are 0."""
    if not _checkable(labels):
        return
    bad = out_of_range(labels, classes)
    checkify.debug_check(
        ~jnp.any(bad),
        f"{function}: label {{label}} is out of range for {classes} classes, at {{index}}; labels must be in "
        f"[0, {classes}) or equal ignore_index",
        **_first(bad, label=labels),
    )


def report_values(function, keep, masked=(), **arrays):
    """An error that names an array with a value that is not finite, the value, and where it is.

    Arrays of floating point, by name; None and index labels are passed over. `keep` has the positions that count, or
    is None where all do; an array that has the positions for its leading axes is looked at there. In those named by
    `masked`, -inf stands for a masked class.
    """
    for name, array in arrays.items():
        if array is None or by_index(array) or not _checkable(array, keep):
            continue
        bad = jnp.isnan(array) | (array == jnp.inf)
        if name not in masked:
            bad |= array == -jnp.inf
        if keep is not None:
            bad &= keep
        checkify.debug_check(
            ~jnp.any(bad), f"{function}: {name} has {{value}} at {{index}}", **_first(bad, value=array)
        )


def _checkable(*arrays):
    # On a mesh of Explicit axes a check cannot be vmapped: JAX sorts the errors of all examples.
    return all(
        array is None or (array.size > 0 and AxisType.Explicit not in jax.typeof(array).sharding.mesh.axis_types)
        for array in arrays
    )


def _first(bad, **values):
    """The index of the first bad element, and the values there.

    One axis after the other, as an index into all of them could exceed an int32.
    """
    index = []
    for _ in range(bad.ndim):
        at = jnp.argmax(jnp.any(bad, range(1, bad.ndim)))
        index.append(at)
        bad, values = bad[at], {name: array[at] for name, array in values.items()}
    return {"index": jnp.array(index, jnp.int32)} | values
