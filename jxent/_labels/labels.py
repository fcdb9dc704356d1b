"""The contract of a kind of labels, with defaults that several kinds share."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Self

from jax import Array
from jaxtyping import Bool, Float, Int

from jxent._core.shards import ClassAxis, Shards
from jxent._rows.costs import LabelCost
from jxent._rows.passes import Row

Mask = Bool[Array, "*positions"] | None
"""False at masked positions; None if no position is masked."""


class Labels(abc.ABC):
    """The labels of some positions, all of one kind. The check of a loss's arguments chooses the kind.

    An implementor is a frozen dataclass of arrays, registered as a pytree. So JAX can shard labels, divide them into
    blocks of positions and differentiate them like any array. A leaf may also be a type, a gradient or dimensions
    instead of an array. Integer leaves have one entry for each position, or k entries for each position. They are the
    same on every shard of the classes. At most one leaf is floating-point, and it may be differentiated.

    As an argument of a loss, labels have the axes of the positions in front. Dense probabilities have the logits' shape
    instead. `with_class_axis` gives labels the axes of the logits, which the methods below it may assume.
    """

    cost_takes_class_weight: ClassVar[bool]
    """Whether the label's cost is a sum over classes with class weights in its terms. If not, one weight scales it."""

    can_be_ignored: ClassVar[bool]
    """Whether a label may be the `ignore_index`."""

    differentiable: ClassVar[bool]
    """Whether `array` may be differentiated."""

    gradient_is_a_share: ClassVar[bool] = False
    """Whether the gradient is the sum of the gradients on the shards of the classes."""

    # --- arrays ---

    @property
    @abc.abstractmethod
    def array(self) -> Any:
        """The main array of the labels, and the only one that may be differentiated."""

    @abc.abstractmethod
    def with_array(self, array: Any) -> Self:
        """The labels with another `array`."""

    @abc.abstractmethod
    def gradient(self, of_array: Array | None) -> Self:
        """The gradients by the leaves: `of_array` for `array`, and None for other leaves."""

    @abc.abstractmethod
    def dimensions(self, positions: tuple[Any, ...], of_logits: tuple[Any, ...], of_entry: Any) -> Self:
        """The dimensions of the leaves, as tuples made from those of the positions, the logits and an entry."""

    # --- before the logits are read ---

    @abc.abstractmethod
    def not_ignored(self, ignore_index: int | None) -> Mask:
        """The mask of positions whose label is not `ignore_index`; None if no position can be ignored."""

    def without_masked(self, mask: Mask) -> Self:
        """The labels, with labels in range at masked positions."""
        del mask
        return self

    def label_weight(
        self, class_weight: Float[Array, " classes"], mask: Mask, shards: Shards, offset: Int[Array, ""] | None
    ) -> Float[Array, "*positions"] | None:
        """The factor of the label's cost for these class weights; None for 1."""
        del class_weight, mask, shards, offset
        return None

    def sharded_as_positions(self, array: Array, axis: int) -> Self:
        """The labels, sharded as the positions of `array`, all its axes except `axis`; by default unchanged."""
        del array, axis
        return self

    def sharded_as_logits(self, logits: Array) -> Self:
        """The labels, sharded as the logits if labels have the logits' shape; by default unchanged."""
        del logits
        return self

    @abc.abstractmethod
    def reported(self, function: str, mask: Mask, classes: ClassAxis, distribution: bool = True) -> Self:
        """The labels, with `checkify` reports of their faults.

        The probabilities are a `distribution` over the classes. Otherwise each one is the share of a yes, in [0, 1].
        """

    @abc.abstractmethod
    def largest(self, classes: ClassAxis) -> Int[Array, "*positions"]:
        """The class of a correct prediction: the label, or the first class with the largest label probability."""

    @abc.abstractmethod
    def with_class_axis(self, axis: int) -> Self:
        """The labels with the axes of logits, whose class axis is `axis`."""

    # --- with a class axis ---

    def moving_where(self, mask: Row | None) -> Self:
        """The labels, as constants for differentiation at masked positions."""
        del mask
        return self

    @property
    def dense(self) -> Array | None:
        """Probabilities with the logits' shape, for `Arrays.q`; None if the labels have no such array."""
        return None

    def of_each_class(self, logits: Array, classes: ClassAxis, dtype: Any) -> Array | None:
        """The probability of each class, in the logits' shape; None for labels with an `index`.

        Sparse probabilities are added to an array of zeros, in `dtype`.
        """
        del logits, classes, dtype
        return self.dense

    def by_array(self, function: Callable[..., Array], classes: ClassAxis, *values: Array) -> Array:
        """``function(*values)`` at the classes of `array`, with 0 for a class of another shard.

        The values have the logits' shape. Labels with an `index` have no such classes.
        """
        del classes
        return function(*values)

    def index(self, classes: ClassAxis) -> Int[Array, "*row"] | None:
        """The class of each position, clipped to the range of all classes and counted from this shard's first class.

        None if a label may have several classes.
        """
        del classes
        return None

    def can_be_left_out(self, classes: ClassAxis) -> bool:
        """Whether the sum of exponentials can leave out the label's class (`normalizer`)."""
        del classes
        return False

    def invalid(self, classes: ClassAxis) -> Bool[Array, "*row"] | None:
        """Whether a label has a class out of range, which makes its position NaN; None if no label can."""
        del classes
        return None

    @abc.abstractmethod
    def cost(self, classes: ClassAxis, class_weight: Array | None) -> LabelCost:
        """The cost of the labels. The class weights broadcast against the logits, like `Arrays.weight`."""
