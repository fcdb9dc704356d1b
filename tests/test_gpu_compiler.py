"""Programs that XLA's GPU compiler makes for H100s, on a machine without a GPU: memory, readings, matmuls, collectives.

Needs the compiler, `jax-cuda13-pjrt` of JAX's version, and what h100.py names with it. Elsewhere the tests are skipped.
"""

import pytest

pytest.importorskip("jax_plugins.xla_cuda13", reason="the GPU compiler comes with pip install jax-cuda13-pjrt")

import contextlib
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from h100 import CUBLAS, h100s
from hlo import Program, collectives
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from train_step import Rules, Step, shapes_of, update_of

import jxent

MIB = 2**20
POSITIONS, FEATURES, VOCAB, BLOCK = 1024, 128, 8192, 256


def compiled(f, arrays, context=None, **options):
    with context or contextlib.nullcontext():  # of the trace alone
        traced = jax.jit(f, **options).trace(*arrays)
    return traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=CUBLAS)


def loss(hidden, kernel, labels, **options):
    """In one loop of known length, because no label is ignored."""
    return jxent.linear_cross_entropy(hidden, kernel, labels, ignore_index=None, **options)


def sum_of_statistics(hidden, kernel, labels, **options):
    stats = loss(hidden, kernel, labels, reduction="none", return_stats=True, **options)[1]
    return jnp.sum(stats.log_prob) + jnp.sum(stats.entropy)


def sum_of_losses(*arrays, **options):
    return jnp.sum(loss(*arrays, reduction="none", **options))


smooth = partial(loss, label_smoothing=0.1, z_loss_weight=1e-4)
PROGRAMS = {
    "the loss alone": loss,
    "gradients": jax.value_and_grad(loss, (0, 1)),
    "frozen kernel": jax.value_and_grad(loss),
    "smoothing and z-loss": jax.value_and_grad(smooth, (0, 1)),
    "no reduction": jax.value_and_grad(sum_of_losses, (0, 1)),
    "statistics": sum_of_statistics,
    "statistics, gradients": jax.value_and_grad(sum_of_statistics, (0, 1)),
}
# How often each loop reads the float32 logits of its block; the forward one first, where there are two.
READINGS = {
    "the loss alone": [1],
    "gradients": [2],
    "frozen kernel": [2],
    "smoothing and z-loss": [2],
    "no reduction": [1, 1],
    "statistics": [1],
    "statistics, gradients": [1, 2],
}


@functools.cache
def program(name, vocab_axis=-1, size=(POSITIONS, FEATURES, VOCAB), block=BLOCK):
    """Of bfloat16 inputs, for one H100."""
    positions, features, vocab = size
    one = SingleDeviceSharding(h100s(1)[0])
    kernel = (features, vocab) if vocab_axis else (vocab, features)
    shapes = ((positions, features), jnp.bfloat16), (kernel, jnp.bfloat16), ((positions,), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=one) for shape in shapes]
    return compiled(partial(PROGRAMS[name], vocab_axis=vocab_axis, block_size=block), arrays)


def text(name, vocab_axis=-1):
    return Program(program(name, vocab_axis).as_text())


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes / MIB


@pytest.mark.parametrize("name", PROGRAMS)
def test_readings_of_the_logits(name):
    """As whole arrays: the label's logit is gathered. A gradient is written once, in 16 bits."""
    loops = text(name)
    assert loops.readings("f32", BLOCK * VOCAB) == READINGS[name]
    of_gradient = {"the loss alone": 0, "statistics": 0, "frozen kernel": 1}.get(name, 2)  # one for each matmul
    assert loops.readings("bf16", BLOCK * VOCAB)[-1] == of_gradient


@pytest.mark.parametrize(("name", "vocab_axis"), [("gradients", -1), ("gradients", 0), ("no reduction", -1)])
def test_matmuls(name, vocab_axis):
    """All of bfloat16 operands; the kernel's gradient is added up in place, by its matmul and nothing else."""
    found = text(name, vocab_axis)
    operands = [[found.types[operand] for operand in m.operands] for m in found.multiplications()]
    assert len(operands) == (3 if name == "gradients" else 4)
    assert {type_[: len("bf16[")] for types in operands for type_ in types[:2]} == {"bf16["}
    (added,) = (m for m in found.multiplications() if '"beta":1' in m.rest)
    summed = (FEATURES, VOCAB) if vocab_axis else (VOCAB, FEATURES)
    assert found.types[added.operands[2]].startswith("f32[{},{}]".format(*summed))
    assert "output_to_operand_aliasing={{0}: (2, {})}" in added.rest
    assert found.readings("f32", FEATURES * VOCAB)[-1:] == [1]


# The default block. The sum of the kernel's gradient is 2004 of the first size's MiB, and 1940 of the second's. The
# second's block is twice what fits into the room of its 16-bit gradient, which takes 8% off the time of its traffic.
@pytest.mark.parametrize(
    ("size", "name", "vocab_axis", "most"),
    [
        ((8192, 4096, 128256), "gradients", -1, 2560),
        ((8192, 4096, 128256), "gradients", 0, 2560),
        ((8192, 4096, 128256), "the loss alone", -1, 520),
        ((16384, 2048, 248320), "gradients", -1, 3900),
    ],
)
def test_temporaries(size, name, vocab_axis, most):
    assert temporaries(program(name, vocab_axis, size, None)) <= most


# --- eight GPUs -------------------------------------------------------------------------------------------------------

BATCH, LENGTH = 8, 512


def mesh_of(mode, **axes):
    return Mesh(np.array(h100s(8)).reshape([*axes.values()]), tuple(axes), axis_types=(AxisType[mode],) * len(axes))


def linear_program(mesh, hidden, kernel, wrt=(0, 1), loss=jxent.linear_cross_entropy, context=None, vocab_axis=-1):
    """Of blocks of 256 positions of all devices; the gradients are sharded as the arrays."""
    shape, spec = (FEATURES, VOCAB), P(*[*kernel, None, None][:2])
    if vocab_axis == 0:
        shape, spec = shape[::-1], P(*spec[::-1])
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((BATCH, LENGTH, FEATURES), jnp.bfloat16, hidden),
            (shape, jnp.bfloat16, spec),
            ((BATCH, LENGTH), jnp.int32, P(*hidden[:2])),
        )
    ]
    f = jax.value_and_grad(partial(loss, block_size=BLOCK, vocab_axis=vocab_axis), wrt)
    shardings = None, tuple(arrays[i].sharding for i in wrt)
    return compiled(f, arrays, context, out_shardings=shardings)


def moved(program, least):
    """(kind, elements, whether in the loop) of the collectives of at least so many elements on a device."""
    return sorted((c.kind, c.size, c.in_loop) for c in collectives(program.as_text()) if c.size >= least)


@pytest.mark.parametrize(("mode", "wrt"), [("Auto", (0, 1)), ("Explicit", (0, 1)), ("Auto", (0,))])
def test_batch_sequence_and_vocabulary(mode, wrt):
    mesh = mesh_of(mode, data=2, sequence=2, vocab=2)
    program = linear_program(mesh, P("data", "sequence"), P(None, "vocab"), wrt)
    found, local_kernel = collectives(program.as_text()), FEATURES * VOCAB // 2
    assert {c.kind for c in found} == {"all-reduce"}
    of_hidden = ("all-reduce", BATCH * LENGTH * FEATURES // 4, False)
    of_kernel = ("all-reduce", local_kernel, False)
    assert moved(program, of_hidden[1]) == [of_hidden, *([of_kernel] if 1 in wrt else [])]
    assert sum(c.size for c in found if c.in_loop) <= 4 * BLOCK // 4  # a few numbers for each of a device's positions


# With named axes XLA:GPU sums the whole gradient, of which each device takes its part.
@pytest.mark.parametrize(
    ("way", "vocab_axis", "kind"),
    [
        ("Explicit", -1, "reduce-scatter"),
        ("set_mesh", -1, "reduce-scatter"),
        ("set_mesh", 0, "reduce-scatter"),
        ("named", -1, "all-reduce"),
    ],
)
def test_fsdp(way, vocab_axis, kind):
    """The kernel is gathered before the loop, and its gradient is summed after it."""
    mesh = mesh_of("Explicit" if way == "Explicit" else "Auto", data=4, vocab=2)
    names = {"axis_name": "vocab", "batch_axis_name": P("data")} if way == "named" else {}
    f = partial(jxent.linear_cross_entropy, **names)
    context = jax.set_mesh(mesh)
    program = linear_program(mesh, P("data"), P("data", "vocab"), loss=f, context=context, vocab_axis=vocab_axis)
    local, part = FEATURES * VOCAB // 2, FEATURES * VOCAB // 8
    of_hidden = ("all-reduce", BATCH * LENGTH * FEATURES // 4, False)
    of_kernel = ("all-gather", local, False), (kind, part if kind == "reduce-scatter" else local, False)
    assert moved(program, part) == sorted([of_hidden, *of_kernel])


def test_whole_step():
    """Of the kernel's size there is one gather and one sum, scattered, and neither is in a loop."""
    step = Step(vocab=8192, features=128, layers=1, batch=16, length=128)
    mesh, rules = mesh_of("Auto", data=4, model=2), Rules(batch="data", embed="data", vocab="model", mlp="model")
    graph, state, tokens = shapes_of(step, rules, mesh)
    options = {
        "donate_argnums": 0,
        "out_shardings": (jax.tree.map(lambda a: a.sharding, state), NamedSharding(mesh, P())),
    }
    update = partial(update_of(step)[1], graph)
    program = compiled(update, (state, tokens), jax.set_mesh(mesh), **options)
    size = step.vocab * step.features // 2
    wanted = [("all-gather", size, False), ("reduce-scatter", size // 4, False)]
    assert [c for c in moved(program, size // 4) if c[1] == size or c[0] == "reduce-scatter"] == wanted
    assert not [c for c in moved(program, step.vocab // 2) if c[2]]  # fewer than one position's logits
