"""The backend of TPUs, whose compiler computes a reduction of logits within the matmul before it."""

from typing import Any

from jxent._backend.backend import BlockNeeds, RowMode
from jxent._backend.xla import XLA, by_budget


class TPU(XLA):
    def row_mode(self, has_gradients: bool, one_sum: bool) -> RowMode:
        """If gradients need the logits, they are written anyway. Then two passes take less arithmetic for one sum."""
        return RowMode.PASSES if has_gradients and one_sum else RowMode.ONE_REDUCTION

    def block_size(self, positions: Any, classes: int, needs: BlockNeeds) -> int:
        """The positions of a block. `XLA.block_size` has the rule, by which a v5e needs 1100 positions.

        With at most half as many positions as features, the logits of a block fit into the room of the kernel's 16-bit
        gradient. Without gradients a block writes no logits, and only reads the kernel once more. If the rows are
        known, it writes the 16-bit gradient of its logits alone, so that twice as many positions need no more memory.
        """
        if needs.mode is RowMode.KNOWN:
            most = 2048 if needs.kernel_gradient else 1024
            return by_budget(positions, classes, least=1024, budget=2**31, most=most)
        if needs.kernel_gradient:
            return by_budget(positions, classes, least=1024, budget=2**30, most=1024)
        if needs.gradients or needs.mode is not RowMode.ONE_REDUCTION:
            return by_budget(positions, classes, least=512, budget=2**29)
        return by_budget(positions, classes, least=2048, budget=2**31, most=2048)
