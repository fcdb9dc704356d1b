"""Checks of arguments at trace time. A wrong argument raises here, before any arithmetic; the error says what to do.

A wrong type or dtype is a TypeError; a wrong shape or value is a ValueError. Each message names the function, the
argument, the value that was wanted, the value that came, and the remedy if there is one.
"""

import math
import numbers
import operator
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jxent._core.dtypes import compute_dtype
from jxent._core.shards import mesh_in_use
from jxent._labels.labels import Labels
from jxent._labels.sparse import SparseLabels
from jxent._rows.costs import Scalars

Shaped = Array | jax.ShapeDtypeStruct
"""An array, or its shape and dtype if a check reads nothing else."""

REDUCTIONS = ("mean", "sum", "none")
FLOATING = tuple(jnp.dtype(d) for d in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))


TO_FLOAT = "convert it with .astype(jnp.float32)"


def array(function: str, name: str, value: Any) -> Array:
    if value is None:
        raise TypeError(f"{function}: {name} must be an array, got None")
    if isinstance(value, tuple) and (hasattr(value, "_fields") or any(_is_array(entry) for entry in value)):
        # JAX would stack the arrays.
        raise TypeError(f"{function}: {name} must be an array, got {_kind_of_tuple(name, value)}")
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:
        info = jnp.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
        if not info.min <= value.min() <= value.max() <= info.max:  # JAX would keep only the low 32 bits of 64
            raise ValueError(_too_large(function, name, info.bits))
    try:
        return jnp.asarray(value)
    except OverflowError as error:
        raise ValueError(_too_large(function, name, jnp.iinfo(jax.dtypes.canonicalize_dtype(int)).bits)) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{function}: {name} must be an array, got {shown(value)}{_array_in(value)}") from error


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray) and value.ndim > 0


def _kind_of_tuple(name: str, value: Any) -> str:
    if isinstance(value, SparseLabels):
        remedy = "these are for the labels of cross_entropy, nll_loss, and the linear losses of labels"
        if name in ("logits_p", "logits_q"):
            remedy = "take cross_entropy(logits, labels), which is the divergence from the labels and their entropy"
        return f"SparseLabels; {remedy}"
    if hasattr(value, "_fields"):
        return f"a {type(value).__name__}; pass one of its fields, {', '.join(value._fields)}"
    return (
        f"a tuple of {len(value)} arrays; pass one of them, or as labels, for (indices, probabilities), "
        "jxent.SparseLabels(indices, probabilities)"
    )


def _too_large(function: str, name: str, bits: int) -> str:
    remedy = "; make smaller numbers of it, or set jax_enable_x64" if bits == 32 else ""
    return f"{function}: {name} has an integer that does not fit into {bits} bits{remedy}"


def _array_in(value: Any) -> str:
    """The remedy for an object that contains the array, as parameters of some libraries do; "" for other objects."""
    if isinstance(value, Mapping):
        return f"; pass one of its entries, of the keys {', '.join(map(repr, value))}"
    if hasattr(value, "unbox"):
        return "; unbox it, with .unbox(), or all parameters with flax.linen.meta.unbox(parameters)"
    if type(value).__module__.partition(".")[0] == "torch":
        return "; convert it with jnp.from_dlpack(tensor.detach())"
    for attribute, layout in (("kernel", ""), ("embedding", " with vocab_axis=0"), ("weight", " with vocab_axis=0")):
        if hasattr(value, attribute):
            return f"; pass its .{attribute}{layout}"
    return ""


def floating(function: str, name: str, value: Any, remedy: str = TO_FLOAT) -> Array:
    given, value = value, array(function, name, value)
    if value.dtype not in FLOATING:
        if jnp.issubdtype(value.dtype, jnp.floating):
            remedy = "convert it with .astype(jnp.bfloat16), and multiply it by its scale if it has one"
        elif not hasattr(given, "astype"):
            remedy = remedy.replace(TO_FLOAT, f"convert it with jnp.asarray({name}, jnp.float32)")
        wanted = ", ".join(d.name for d in FLOATING)
        raise TypeError(f"{function}: {name} must be floating point ({wanted}), got {value.dtype}; {remedy}")
    return value


def real(function: str, name: str, value: Any, dtype: Any) -> Array | None:
    """Weights and biases. Floating-point arrays keep their dtype; integers, booleans and Python numbers are converted.

    They get the dtype in which a loss of logits of `dtype` is computed.
    """
    if value is None:
        return None
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        value = value.astype(compute_dtype(dtype))
    number = isinstance(value, int | float) and not isinstance(value, np.generic)
    value = array(function, name, value)
    whole = jnp.issubdtype(value.dtype, jnp.integer) or value.dtype == jnp.bool_
    return value.astype(compute_dtype(dtype)) if whole or number else floating(function, name, value)


def integer(function: str, name: str, value: Any) -> int:
    """A Python (or NumPy) integer; such options are static."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{function}: {name} must be a Python integer, got {shown(value)}")
    return operator.index(value)


def shown(value: Any) -> str:
    """The value that came in place of a Python value, and the remedy if it is an array, traced or not."""
    shown = f"{value!r:.80} ({type(value).__name__})"
    if isinstance(value, jax.Array):
        return f"{shown}; it is static: pass a Python value, and mark it with static_argnames where you jit"
    return shown


def class_axes(function: str, logits: Any, axis: Any) -> tuple[int, ...]:
    """The class axes of the softmax functions, a sorted tuple counted from the front; None means all of them."""
    if axis is None:
        return tuple(range(logits.ndim))
    if logits.ndim == 0 and axis != ():
        raise ValueError(f"{function}: axis={axis} has no axis to name in scalar logits; pass axis=None")
    axes = []
    for a in axis if isinstance(axis, tuple | list) else (axis,):
        a = integer(function, "axis", a)
        if not -logits.ndim <= a < logits.ndim:
            raise ValueError(
                f"{function}: axis must be in [{-logits.ndim}, {logits.ndim}) for logits of shape {logits.shape}, got "
                f"{a}"
            )
        axes.append(a % logits.ndim)
    if len(set(axes)) < len(axes):
        raise ValueError(f"{function}: axis must not name an axis twice, got {axis}")
    return tuple(sorted(axes))


def class_axis(function: str, name: str, value: Any, axis: Any) -> int:
    """The class axis as an index from the front; there must be at least one class."""
    axis = integer(function, "axis", axis)
    if value.ndim == 0:
        raise ValueError(f"{function}: {name} needs a class axis, got a scalar")
    if not -value.ndim <= axis < value.ndim:
        raise ValueError(
            f"{function}: axis must be in [{-value.ndim}, {value.ndim}) for {name} of shape {value.shape}, got {axis}"
        )
    axis %= value.ndim
    if value.shape[axis] == 0:
        raise ValueError(f"{function}: {name} must have at least one class, got shape {value.shape} with axis={axis}")
    return axis


def kernel_axis(function: str, hidden: Array, kernel: Array, vocab_axis: Any, of: str = "") -> int:
    """The vocabulary's axis of the kernel, 0 or 1; the kernel's other axis has the features.

    The names of both arguments end in `of`.
    """
    vocab_axis = integer(function, "vocab_axis", vocab_axis)
    if hidden.ndim == 0:
        raise ValueError(f"{function}: hidden{of} needs a features axis, got a scalar")
    if kernel.ndim != 2:
        raise ValueError(
            f"{function}: kernel{of} must have two axes, features and vocabulary, got shape {kernel.shape}"
        )
    if not -2 <= vocab_axis < 2:
        raise ValueError(f"{function}: vocab_axis must be -1 or 0, got {vocab_axis}")
    vocab_axis %= 2
    features = kernel.shape[1 - vocab_axis]
    if hidden.shape[-1] != features:
        layout = "(features, vocab)" if vocab_axis else "(vocab, features)"
        remedy = ""
        if hidden.shape[-1] == kernel.shape[vocab_axis]:
            remedy = f"; for a kernel of the other layout pass vocab_axis={-1 if vocab_axis == 0 else 0}"
        elif hidden.ndim > 2 and hidden.shape[1] == features:
            remedy = f"; for PyTorch's layout (N, features, d1, ..., dk) pass jnp.moveaxis(hidden{of}, 1, -1)"
        raise ValueError(
            f"{function}: hidden{of} and kernel{of} must have the same number of features, got {hidden.shape[-1]} in "
            f"hidden{of} of shape {hidden.shape} and {features} in kernel{of} {layout} of shape {kernel.shape}{remedy}"
        )
    if kernel.shape[vocab_axis] == 0:
        shown = -1 if vocab_axis else 0
        raise ValueError(
            f"{function}: kernel{of} must have at least one class, got shape {kernel.shape} with vocab_axis={shown}"
        )
    return vocab_axis


def one_device_if_symbolic(function: str, *arrays: Array) -> None:
    """Symbolic shapes (`jax.export`) need one device: on several, JAX fails to refine them or ends the process."""
    mesh, shapes = mesh_in_use(*arrays), [array.shape for array in arrays]
    symbolic = not all(isinstance(size, int) for shape in shapes for size in shape)
    if symbolic and math.prod(mesh.shape.values()) > 1:
        raise ValueError(
            f"{function}: arrays on a mesh of several devices must have concrete shapes, got "
            f"{', '.join(map(str, shapes))}; export for concrete shapes, or for one device without a mesh"
        )


def per_class(function: str, name: str, value: Any, classes: int, dtype: Any) -> Array | None:
    value = real(function, name, value, dtype)
    if value is not None and value.shape != (classes,):
        raise ValueError(f"{function}: {name} must have one entry per class, shape {(classes,)}, got {value.shape}")
    return value


def number_or_per_class(function: str, name: str, value: Any, classes: int, dtype: Any) -> Array | None:
    value = real(function, name, value, dtype)
    if value is not None and value.shape not in ((), (classes,)):
        raise ValueError(
            f"{function}: {name} must be a number or have one entry per class, shape {(classes,)}, got {value.shape}"
        )
    return value


def positive(function: str, name: str, value: Any) -> int:
    value = integer(function, name, value)
    if value < 1:
        raise ValueError(f"{function}: {name} must be at least 1, got {value}")
    return value


def matmul_precision(function: str, value: Any) -> Any:
    """A precision for `jax.lax.dot_general`, checked by a trace of a matmul with this precision."""
    if value is None:  # saves the trace
        return None
    value = tuple(value) if isinstance(value, list) else value
    wrong = (
        f'{function}: precision must be None, a string such as "highest", a jax.lax.Precision, a pair of these, or '
        f"a dot algorithm, as for jax.lax.dot_general, got {shown(value)}"
    )
    if isinstance(value, jax.Array):  # JAX would compare the array, and raise other errors
        raise TypeError(wrong)
    try:
        of_any = jax.ShapeDtypeStruct((1, 1), jnp.float32)
        jax.eval_shape(partial(jax.lax.dot, precision=value), of_any, of_any)
    except (TypeError, ValueError) as error:
        raise (ValueError if isinstance(value, str | tuple) else TypeError)(wrong) from error
    return value


def broadcastable(function: str, name: str, value: Any, shape: tuple[int, ...], what: str) -> Array | None:
    if value is None:
        return None
    try:
        fits = jnp.broadcast_shapes(value.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{function}: {name} must broadcast to {what}, {tuple(shape)}, got shape {value.shape}")
    return value


def mask(function: str, value: Any, shape: tuple[int, ...], what: str, remedy: str) -> Array | None:
    """`where`: boolean, broadcastable to `shape`."""
    if value is None:
        return None
    given, value = value, array(function, "where", value)
    if value.dtype != jnp.bool_:
        if not hasattr(given, "astype"):  # a list is never equal to 0
            remedy = remedy.replace("mask != 0", "jnp.asarray(mask) != 0")
        raise TypeError(f"{function}: where must be boolean, got {value.dtype}; {remedy}")
    return broadcastable(function, "where", value, shape, what)


def weights(
    function: str, class_weight: Any, sample_weight: Any, where: Any, logits: Any, axis: Any
) -> tuple[Array | None, Array | None, Array | None]:
    """The three weights of a loss: one has an entry per class, two broadcast to the positions."""
    shape = logits.shape[:axis] + logits.shape[axis + 1 :]
    classes = logits.shape[axis]
    class_weight = per_class(function, "class_weight", class_weight, classes, logits.dtype)
    sample_weight = real(function, "sample_weight", sample_weight, logits.dtype)
    what = "the positions (the shape of the labels)"
    broadcastable(function, "sample_weight", sample_weight, shape, what)
    return (
        class_weight,
        sample_weight,
        mask(function, where, shape, what, "compare it (mask != 0), or pass weights as sample_weight"),
    )


def ignored_class(function: str, value: object, labels: Labels) -> int | None:
    """`ignore_index`; None, which ignores no label, stays None."""
    if value is None:
        return None
    ignore_index = integer(function, "ignore_index", value)
    if ignore_index != -100 and not labels.can_be_ignored:
        raise ValueError(
            f"{function}: ignore_index={ignore_index} applies to integer labels, but labels are class probabilities "
            f"({labels.array.dtype}); leave positions out with where="
        )
    return ignore_index


def reduction(function: str, value: Any) -> str:
    if value is None:
        wanted = f'one of {REDUCTIONS}, got None; for the loss of each position pass "none"'
        raise TypeError(f"{function}: reduction must be {wanted}")
    if not isinstance(value, str):
        raise TypeError(f"{function}: reduction must be a string, one of {REDUCTIONS}, got {shown(value)}")
    if value not in REDUCTIONS:
        raise ValueError(f"{function}: reduction must be one of {REDUCTIONS}, got {value!r}")
    return value


def flag(function: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{function}: {name} must be True or False, got {shown(value)}")
    return bool(value)


def scalar(function: str, name: str, value: Any, low: float, high: float, positive: bool = False) -> float | Array:
    """A Python number in [low, high] (static), or a floating-point scalar array (traced, its value unchecked).

    A Python number must be finite in float32 too. If `positive`, it is a divisor: the number and its inverse must be
    normal numbers of float32.
    """
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value.item()
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = float(value)
        if not low <= value <= min(high, float(np.finfo(np.float32).max)) or (positive and not _divides(value)):
            wanted = f"in [{low}, {high}]" if high < math.inf else f"finite and at least {low}, in float32"
            wanted = "finite and positive in float32, and so must its inverse" if positive else wanted
            raise ValueError(f"{function}: {name} must be {wanted}, got {value}")
        return value
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{function}: {name} must be a number or a floating-point scalar, got {shown(value)}")
    if jnp.issubdtype(value.dtype, jnp.integer):
        value = value.astype(jnp.float32)
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{function}: {name} must be a number or a floating-point scalar, got dtype {value.dtype}; convert "
            "it with .astype(jnp.float32)"
        )
    if value.shape != ():
        raise ValueError(f"{function}: {name} must be a number or a scalar, got shape {value.shape}")
    return jnp.asarray(value)


def common_dtype(*arrays: Array | None) -> jnp.dtype:
    """The dtype to compute in for these arrays."""
    return compute_dtype(*(given.dtype for given in arrays if given is not None))


def temperature(function: str, value: Any, logits: Shaped, axis: int, dtype: Any) -> Array | None:
    """A temperature as a scalar array or one that broadcasts to the positions; None for 1.

    A Python number must be a divisor, as in `scalar`, and becomes an array of `dtype`. The values of arrays are not
    checked.
    """
    if isinstance(value, list | tuple):
        value = array(function, "temperature", value)
    if isinstance(value, jax.Array | np.ndarray) and value.ndim:
        value = jnp.asarray(value)
        value = value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.integer) else value
        value = floating(function, "temperature", value)
        shape = logits.shape[:axis] + logits.shape[axis + 1 :]
        return broadcastable(function, "temperature", value, shape, "the positions (the shape of the labels)")
    number = scalar(function, "temperature", value, 0, math.inf, positive=True)
    if isinstance(number, Array):
        return number
    return None if number == 1 else jnp.asarray(number, dtype)


def _divides(value: Any) -> bool:
    """Whether a Python number can be a divisor in float32, where some compilers multiply by its inverse."""
    tiny = float(np.finfo(np.float32).tiny)
    return tiny <= value <= 1 / tiny


def inner_share(function: str, name: str, value: Any) -> float:
    """A Python number between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{function}: {name} must be a Python number, got {shown(value)}")
    value = float(value)
    if not 0 < value < 1:
        raise ValueError(
            f"{function}: {name} must lie between 0 and 1, got {value}; the divergence is 0 at either end: take "
            f"{function.replace('js', 'kl')}, in one order or the other"
        )
    return value


def same_shape(function: str, name: str, value: Any, other_name: str, other: Array) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{function}: {name} and {other_name} must have the same shape, got {value.shape} in {name} and "
            f"{other.shape} in {other_name}"
        )


def pair(function: str, name: str, value: Any) -> tuple[int, int]:
    """One integer for both sides of a divergence, or one for each."""
    values = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(values) != 2:
        raise ValueError(f"{function}: {name} must be one integer, or a pair for P and Q, got {value!r}")
    return values


def same_positions(function: str, hidden_p: Array, hidden_q: Array) -> None:
    if hidden_p.shape[:-1] != hidden_q.shape[:-1]:
        raise ValueError(
            f"{function}: hidden_p and hidden_q must have the same leading shape, got {hidden_p.shape} in hidden_p and "
            f"{hidden_q.shape} in hidden_q"
        )


def same_vocabulary(function: str, kernel_p: Array, axis_p: int, kernel_q: Array, axis_q: int) -> None:
    of_p, of_q = kernel_p.shape[axis_p], kernel_q.shape[axis_q]
    if of_p != of_q:
        raise ValueError(
            f"{function}: kernel_p and kernel_q must have the same vocabulary, got {of_p} classes in kernel_p of shape "
            f"{kernel_p.shape} and {of_q} in kernel_q of shape {kernel_q.shape}; vocab_axis may be a pair, for P and Q"
        )


def scalars(function: str, label_smoothing: Any, z_loss_weight: Any) -> Scalars:
    return Scalars(
        label_smoothing=scalar(function, "label_smoothing", label_smoothing, 0, 1),
        z_loss_weight=scalar(function, "z_loss_weight", z_loss_weight, 0, math.inf),
    )


def softcap(function: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{function}: logit_softcap must be None or a Python number, got {shown(value)}")
    value = float(value)
    if not _divides(value):
        raise ValueError(
            f"{function}: logit_softcap must be positive and finite in float32, and so must its inverse, got {value}; "
            "None switches it off"
        )
    return value
