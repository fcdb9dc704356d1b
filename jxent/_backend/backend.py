"""The contract of a backend: the choices that depend on the platform."""

import abc
import enum
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

Gradient = Float[Array, "rows columns"]
"""The gradient of a kernel, (features, vocab) or (vocab, features)."""


class RowMode(enum.Enum):
    """How the normalizer of each row of logits, and other sums over the classes, are computed."""

    PASSES = enum.auto()
    """By passes over the logits, which read them several times."""

    SAVED_EXP = enum.auto()
    """By passes. The first one keeps the exponentials, in an array of the logits' size."""

    ONE_REDUCTION = enum.auto()
    """By one reduction, if it has all that the costs need, and otherwise by passes."""

    KNOWN = enum.auto()
    """Not at all: an earlier sweep has computed them, and the gradient reads each logit once."""


class BlockNeeds(NamedTuple):
    """What is computed in each block of positions."""

    gradients: bool
    """Whether gradients or tangents need the logits, so that they are stored."""

    kernel_gradient: bool
    mode: RowMode
    """How to compute the rows."""


class Backend(abc.ABC):
    """How a platform sums over the classes, multiplies, and divides positions into blocks.

    An implementor decides only speed and memory. The results of all backends are equal up to rounding. A backend is
    static and has no state, so all instances of one Python class behave alike. `platform.BACKENDS` lists the backends.
    """

    saves_exp: bool
    """Whether to keep exponentials for later passes, if there is room for an array of the logits' size."""

    least_step: int
    """The number of positions in the smallest blocks of unmasked positions."""

    @abc.abstractmethod
    def blocks_of_sum(self, classes: int) -> int:
        """The number of blocks of classes that a sum adds up first, a divisor of `classes`; 1 for no blocks."""

    @abc.abstractmethod
    def blocks_of_masked_sum(self, classes: int, itemsize: int) -> int:
        """The same number for a sum of exponentials that leaves one class out; a logit has `itemsize` bytes."""

    def row_mode(self, has_gradients: bool, one_sum: bool) -> RowMode:
        """How to compute the rows of a block, which has room for an array of the logits' size.

        `one_sum` is True if the costs need only the maximum and one sum.
        """
        del has_gradients, one_sum
        return RowMode.SAVED_EXP if self.saves_exp else RowMode.ONE_REDUCTION

    def blocks_of_reduction(self, classes: int) -> int:
        """The number of blocks of classes that `RowMode.ONE_REDUCTION` reduces first; 1 for no blocks."""
        del classes
        return 1

    @abc.abstractmethod
    def argmax(self, logits: Float[Array, "*shape"], axis: int, classes: int) -> Int[Array, "*row"]:
        """The first class with the largest logit, or the first whose logit is NaN; a row array of int32.

        `classes` is the number of classes along the axis, or 0 if they cannot be divided into blocks.
        """

    @abc.abstractmethod
    def top_k(
        self, logits: Float[Array, "*block vocab"], k: int, classes: int
    ) -> tuple[Float[Array, "*block k"], Int[Array, "*block k"]]:
        """(the k largest logits of each row in falling order, their classes), in the order of `lax.top_k`.

        `classes` is the number of classes, or 0 if they cannot be divided into blocks.
        """

    @abc.abstractmethod
    def block_size(self, positions: Any, classes: int, needs: BlockNeeds) -> int:
        """The number of positions in a block, whose logits are in memory at once. `positions` may be symbolic."""

    @abc.abstractmethod
    def kernel_gradient(
        self,
        hidden: Float[Array, "*block features"],
        dlogits: Float[Array, "*block vocab"],
        vocab_axis: int,
        precision: Any,
    ) -> Gradient:
        """The gradient by the kernel from one block, in at least float32, in the layout that suits the platform."""

    @abc.abstractmethod
    def in_layout_of_kernel(self, gradient: Gradient, vocab_axis: int, one_block: bool) -> Gradient:
        """A gradient from `kernel_gradient`, of one block or summed over several, in the layout of the kernel."""

    @abc.abstractmethod
    def dtype_over_devices(self, dtype: jnp.dtype) -> jnp.dtype:
        """The dtype in which arrays of this dtype are added up over devices."""
