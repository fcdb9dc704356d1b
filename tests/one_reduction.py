"""The form of GPUs and TPUs on a CPU: all that a row of a block comes down to, in one reduction."""

import math

from jxent._backend.cpu import CPU
from jxent._backend.platform import BACKENDS
from jxent._backend.xla import XLA


class OneReduction(XLA):
    """As on a GPU, in two steps, because a CPU adds up in order, and in the small blocks of a CPU."""

    block_size = CPU.block_size
    least_step = CPU.least_step

    def blocks_of_reduction(self, classes):
        return math.isqrt(classes) if classes > 64 else 1

    def dtype_over_devices(self, dtype):
        return CPU().dtype_over_devices(dtype)


def switch_on():
    """For the whole process."""
    BACKENDS["cpu"] = OneReduction()
