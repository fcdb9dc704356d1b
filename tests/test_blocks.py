"""How classes and positions are cut into blocks, which no caller sees, but memory, speed and sharding rest on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jxent
from jxent._backend.cpu import blocks_in
from jxent._sweep.blocks import blocks_of, not_repeated, put, take


@pytest.mark.parametrize(
    ("classes", "number"),
    {
        1000: 40, 20000: 160, 32000: 256, 32064: 192, 32768: 256, 32769: 99, 50257: 29, 65536: 256, 131072: 256,
        151936: 128, 200064: 384, 1000000: 320, 1048576: 512,
        # No divisor will do where blocks would be shorter than 16 classes, or longer than 2^15, or single classes.
        32: 1, 34: 2, 48: 1, 64: 1, 97: 1, 272: 16, 65537: 1, 999958: 1, 3 * 32749: 3, 2 * 32771: 1,
    }.items(),
)  # fmt: skip
def test_blocks_of_classes(classes, number):
    assert blocks_in(classes) == number


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize(
    ("name", "dtype", "most"),
    [
        ("logsumexp", "float32", 2**15),
        ("nll_loss", "bfloat16", 2**15),
        ("cross_entropy", "float32", 2**14),
        ("cross_entropy", "float16", 2**15),
    ],
)
def test_sums_over_many_classes_are_in_blocks_on_a_cpu(name, dtype, most, platform):
    def program(classes):
        logits, index = jax.ShapeDtypeStruct((8, classes), dtype), jax.ShapeDtypeStruct((8,), "int32")
        args = {"logsumexp": (logits,), "nll_loss": (logits, logits), "cross_entropy": (logits, index)}[name]
        return jax.jit(getattr(jxent, name)).trace(*args).lower(lowering_platforms=(platform,)).as_text()

    assert f"tensor<8x256x{most // 256}x" not in program(most)
    assert (f"tensor<8x256x{most // 256 + 1}x" in program(most + 256)) == (platform == "cpu")


def test_sums_over_two_axes():
    """Of which the first alone would be in blocks."""
    x = jnp.linspace(0, 1, 33024 * 2).reshape(33024, 2)
    np.testing.assert_allclose(jxent.logsumexp(x, (0, 1)), np.log(np.sum(np.exp(np.asarray(x, float)))), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "most", "size", "steps"),
    [
        ((), 1, (), ()),
        ((0,), 4, (0,), (1,)),
        ((8,), 8, (8,), (1,)),
        ((8,), 9, (8,), (1,)),
        ((4096,), 1000, (512,), (8,)),  # a divisor, of more than half of what may be
        ((24,), 5, (4,), (6,)),
        ((26,), 13, (13,), (2,)),
        ((26,), 12, (9,), (3,)),  # none: the last block reaches back over the one before it
        ((33,), 7, (7,), (5,)),
        ((1031,), 100, (94,), (11,)),
        ((8, 2048), 1024, (8, 128), (1, 16)),  # along the longest axis
        ((347, 3), 64, (21, 3), (17, 1)),
        ((6, 6), 4, (1, 3), (6, 2)),  # and another, where one of its positions is too much
        ((2, 3, 5), 4, (2, 2, 1), (1, 2, 5)),
        ((11, 7), 4, (1, 4), (11, 2)),
        ((3, 31), 1, (1, 1), (3, 31)),
    ],
    ids=str,
)
def test_blocks_of_positions(shape, most, size, steps):
    """Of that size; `take` and `put` mean the same positions; each position is owned by one block."""
    blocks = blocks_of(shape, most)
    assert blocks == (shape, size, steps)
    places = jnp.arange(math.prod(shape)).reshape(shape)
    seen, copy = np.zeros(places.size, int), jnp.full(shape, -1)
    for i in range(blocks.number):
        block, mine = take(blocks, i, places), not_repeated(blocks, i)
        assert block.shape == size
        np.add.at(seen, np.asarray(block)[np.broadcast_to(True if mine is None else mine, size)], 1)
        copy = put(blocks, i, copy, block)
    np.testing.assert_array_equal(seen, 1)
    np.testing.assert_array_equal(copy, places)


def test_blocks_are_strided():
    """So that each has a slice of every shard; but of neighbours where no divisor will do."""
    np.testing.assert_array_equal(take(blocks_of((24,), 5), 1, jnp.arange(24)), [1, 7, 13, 19])
    np.testing.assert_array_equal(take(blocks_of((26,), 12), 2, jnp.arange(26)), np.arange(17, 26))
