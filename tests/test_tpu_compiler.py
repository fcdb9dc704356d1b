"""Programs that the TPU compiler makes, on a machine without a TPU: what they move between chips, and what they hold.

Needs `libtpu`, of the version that `pip install "jax[tpu]"` brings. Elsewhere these tests are skipped.
"""

import os

import pytest

pytest.importorskip("libtpu", reason="the TPU compiler comes with pip install 'jax[tpu]'")
os.environ |= {  # for libtpu not to look for chips
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
# By default one process of a machine may load libtpu, because it may open the chips. A compiler opens none. So the
# workers of pytest-xdist can share these tests, also while a job runs on the chips.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import collections
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hlo import Program, collectives
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from train_step import Rules, Step, shapes_of, update_of

import jxent

BATCH, LENGTH, FEATURES, VOCAB = 8, 2048, 2048, 131072
MIB = 2**20


@functools.cache
def chips(topology):
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def mesh_of(topology, mode, **axes):
    return Mesh(
        np.array(chips(topology)).reshape([*axes.values()]), tuple(axes), axis_types=(AxisType[mode],) * len(axes)
    )


def compiled(f, *arrays, context=None, **options):
    with context or contextlib.nullcontext():  # of the trace alone
        traced = jax.jit(f, **options).trace(*arrays)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def loss(hidden, kernel, labels, **options):
    return jxent.linear_cross_entropy(hidden, kernel, labels, block_size=1024, **options)


def linear_program(mesh, hidden, kernel, wrt=(0, 1), loss=loss, context=None):
    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    return compiled(
        jax.value_and_grad(loss, wrt),
        array((BATCH, LENGTH, FEATURES), jnp.bfloat16, hidden),
        array((FEATURES, VOCAB), jnp.bfloat16, kernel),
        array((BATCH, LENGTH), jnp.int32, P(*hidden[:2])),
        context=context,
    )


def temporaries(program):
    """MiB at the peak, besides arguments and results; JAX 0.12 counts some arrays twice in `temp_size_in_bytes`."""
    held = program.memory_analysis()
    return (held.peak_memory_in_bytes - held.argument_size_in_bytes - held.output_size_in_bytes) / MIB


def room_of_results(program):
    """MiB that a block had in results that are not written yet, and has no more from JAX 0.12 on."""
    return program.memory_analysis().output_size_in_bytes / MIB if jax.__version_info__ >= (0, 12) else 0


def moved(program, least):
    """(kind, elements, whether in the loop) of the collectives of at least so many elements on a chip."""
    return sorted((c.kind, c.size, c.in_loop) for c in collectives(program.as_text()) if c.size >= least)


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize(("wrt", "most"), [((0, 1), 700), ((0,), 260)], ids=["both", "frozen kernel"])
def test_batch_sequence_and_vocabulary(wrt, most, mode):
    mesh = mesh_of("v5e:2x4", mode, data=2, sequence=2, vocab=2)
    program = linear_program(mesh, P("data", "sequence"), P(None, "vocab"), wrt)
    assert {c.kind for c in collectives(program.as_text())} == {"all-reduce"}
    local_kernel = FEATURES * VOCAB // 2
    assert moved(program, local_kernel // 8) == ([("all-reduce", local_kernel, False)] if 1 in wrt else [])
    assert temporaries(program) <= most + room_of_results(program)


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_skipped_positions(mode):
    """What may be skipped adds one number to what is moved, before the loop; with Auto axes nothing is skipped."""
    mesh = mesh_of("v5e:2x4", mode, data=2, sequence=2, vocab=2)

    def found(**options):
        summed = functools.partial(loss, reduction="sum", **options)
        text = linear_program(mesh, P("data", "sequence"), P(None, "vocab"), loss=summed).as_text()
        return " sort(" in text, collections.Counter((c.kind, c.size, c.in_loop) for c in collectives(text))

    (ordered, skipping), (never_ordered, all_of_them) = found(), found(ignore_index=None)
    assert skipping == all_of_them + collections.Counter({("all-reduce", 1, False): 1} if mode == "Explicit" else {})
    assert ordered == (mode == "Explicit")
    assert not never_ordered


def test_one_chip_skips_positions():
    """Which are put in order first; with `Auto` axes that the compiler need not shard over, too."""
    one = Mesh(np.array(chips("v5e:2x4"))[:1], ("data",), axis_types=(AxisType.Auto,))
    assert " sort(" in linear_program(one, P(), P()).as_text()


@pytest.mark.parametrize("wrt", [(0, 1), (0,)], ids=["both", "frozen kernel"])
@pytest.mark.parametrize("way", ["Explicit", "explicit_axes", "set_mesh"])
def test_fsdp(way, wrt):
    mesh = mesh_of("v5e:2x4", "Explicit" if way == "Explicit" else "Auto", data=4, vocab=2)
    specs = P("data"), P("data", "vocab")
    f = jax.sharding.explicit_axes(loss, in_sharding=(*specs, P("data"))) if way == "explicit_axes" else loss
    program = linear_program(mesh, *specs, wrt, f, context=None if way == "Explicit" else jax.set_mesh(mesh))
    gathered = ("all-gather", FEATURES * VOCAB // 2, False)
    gradient = {
        "set_mesh": ("all-reduce", FEATURES * VOCAB // 2, False),
    }.get(way, ("reduce-scatter", FEATURES * VOCAB // 8, False))
    assert moved(program, FEATURES * VOCAB // 8) == sorted([gathered, gradient] if 1 in wrt else [gathered])


def test_counts_are_those_of_the_compiler():
    """`Program.work` counts as the compiler does where no loop is, and more where a loop turns more often."""
    one = jax.sharding.SingleDeviceSharding(chips("v5e:2x2")[0])

    def count(f, *shapes):
        program = compiled(f, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one) for shape in shapes))
        return Program(program.as_text()).work(), program.cost_analysis()

    # Of sizes that the fast memory does not hold: what is copied there ahead of its use is no traffic of its own.
    for f, *shapes in (
        (jnp.add, (8192, 32768), (8192, 32768)),
        (jax.nn.softmax, (8192, 32768)),
        (lambda a, b: jnp.sum(jnp.exp(a @ b), 1), (16384, 16384), (16384, 32768)),
    ):
        work, own = count(f, *shapes)
        np.testing.assert_allclose(work.bytes, own["bytes accessed"], rtol=1e-3)
        if work.flops:
            np.testing.assert_allclose(work.flops, own["flops"], rtol=1e-2)

    def product(hidden, kernel, length):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ kernel), None), hidden, None, length=length)[0]

    def total(array, _, length):
        return jax.lax.fori_loop(0, length, lambda i, s: s + jnp.sum(array * i, dtype=jnp.float32), 0.0)

    for f, flops, read in ((product, 2 * 16384**3, None), (total, 0, 2 * 16384**2)):
        shapes = (16384, 16384), (16384, 16384)
        (few, own), (many, same) = (count(functools.partial(f, length=length), *shapes) for length in (7, 19))
        assert (few.flops, many.flops) == (7 * flops, 19 * flops)
        assert own["flops"] == same["flops"], "the compiler's own counts include the length of a loop by now"
        if read:
            np.testing.assert_allclose([few.bytes, many.bytes], [7 * read, 19 * read], rtol=1e-3)


WHOLE = Step(vocab=30720, features=256, layers=1, batch=16, length=512)
FSDP = {"data": 8}, Rules(batch="data", embed="data")
FSDP_VOCAB = {"data": 4, "model": 2}, Rules(batch="data", embed="data", vocab="model", mlp="model")
SIXTEEN = {"data": 4, "sequence": 2, "model": 2}, Rules("data", "sequence", "model", "data", "model")


# Tests of the loss alone said nothing of what XLA does with it between a model and its optimizer.
@pytest.mark.parametrize(
    ("topology", "layout", "step"),
    [
        ("v5e:2x4", FSDP, WHOLE._replace(named=True)),
        ("v5e:2x4", FSDP, WHOLE._replace(constrain=False)),
        ("v6e:2x4", FSDP_VOCAB, WHOLE),
        ("v5e:4x4", SIXTEEN, WHOLE._replace(named=True, tied=False, scan=True, layers=2)),
    ],
    ids=["named", "untold-unconstrained", "untold-vocabulary", "named-untied-scan-sequence-vocabulary"],
)
def test_whole_step(topology, layout, step):
    """Of the kernel's size there is one gather and one sum, scattered but over two axes, and neither is in a loop."""
    axes, rules = layout
    mesh = mesh_of(topology, "Auto", **axes)
    graph, state, tokens = shapes_of(step, rules, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, state), NamedSharding(mesh, P())
    update = functools.partial(update_of(step)[1], graph)
    program = compiled(update, state, tokens, context=jax.set_mesh(mesh), donate_argnums=0, out_shardings=shardings)
    size = step.vocab * step.features // axes.get("model", 1)
    scattered = ("reduce-scatter", size // axes["data"], False)
    wanted = [("all-gather", size, False), ("all-reduce", size, False) if rules.length else scattered]
    assert [c for c in moved(program, size // axes["data"]) if c[1] == size or c == scattered] == wanted
    block = step.vocab * 256 // axes.get("model", 1)  # the logits of the smallest
    assert not [c for c in moved(program, block // 8) if c[2]]


@pytest.mark.parametrize(
    ("axes", "hidden", "kernel", "named"),
    [
        ({"data": 8}, P("data"), P("data"), False),
        ({"data": 4, "vocab": 2}, P("data"), P("data", "vocab"), True),
        ({"data": 2, "sequence": 2, "vocab": 2}, P("data", "sequence"), P(None, "vocab"), False),
    ],
    ids=["FSDP", "FSDP and vocabulary", "batch, sequence, vocabulary"],
)
def test_either_layout_of_the_kernel(axes, hidden, kernel, named):
    """(vocab, features) takes the temporaries of (features, vocab), and neither moves in the loop."""
    mesh, positions = mesh_of("v5e:2x4", "Auto", **axes), P(*hidden[:2])
    features, vocab = [*kernel, None, None][:2]
    names = {"axis_name": vocab, "batch_axis_name": positions} if named else {}
    held = []
    for vocab_axis in (-1, 0):
        shape, spec = ((FEATURES, VOCAB), P(features, vocab)) if vocab_axis else ((VOCAB, FEATURES), P(vocab, features))
        arrays = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, dtype, spec in (
                ((BATCH, LENGTH, FEATURES), jnp.bfloat16, hidden),
                (shape, jnp.bfloat16, spec),
                ((BATCH, LENGTH), jnp.int32, positions),
            )
        ]
        f = functools.partial(loss, vocab_axis=vocab_axis, **names)
        shardings = None, tuple(array.sharding for array in arrays[:2])
        program = compiled(jax.value_and_grad(f, (0, 1)), *arrays, out_shardings=shardings)
        assert not [c for c in moved(program, FEATURES * VOCAB // 64) if c[2]]
        held.append(temporaries(program))
    assert held[1] <= 1.1 * held[0]


def test_temporaries_fall_as_the_mesh_grows():
    """The same global program on 8 and on 64 chips of v5p."""
    held = []
    for topology, axes in (("v5p:2x2x2", (2, 2, 2)), ("v5p:4x4x4", (8, 2, 4))):
        mesh = mesh_of(topology, "Auto", **dict(zip(("data", "sequence", "vocab"), axes, strict=True)))
        program = linear_program(mesh, P("data", "sequence"), P(None, "vocab"))
        assert {c.kind for c in collectives(program.as_text())} == {"all-reduce"}
        held.append(temporaries(program))
    assert held[1] < held[0] / 1.9


def everything(logits, labels, probabilities, class_weight, sample_weight, hidden, kernel, bias):
    """Every public function, with every option that changes its program."""
    options = {"class_weight": class_weight, "sample_weight": sample_weight}
    smooth = {"label_smoothing": 0.1, "z_loss_weight": 0.01, "logit_softcap": 30.0, "return_stats": True}
    log_probs = jxent.log_softmax(logits)
    out = [
        jnp.sum(jxent.logsumexp(logits, where=probabilities > 0)),
        jnp.sum(jxent.softmax(logits) * probabilities),
        jxent.nll_loss(log_probs, labels, **options),
        jxent.nll_loss(log_probs, probabilities, **options),
        jxent.cross_entropy(logits, labels),
        jnp.sum(jxent.cross_entropy(logits, jxent.next_token_labels(labels), reduction="none")),
    ]
    for labels_ in (labels, probabilities):
        value, stats = jxent.cross_entropy(logits, labels_, **options, **smooth)
        linear, linear_stats = jxent.linear_cross_entropy(
            hidden, kernel, labels_, bias=bias, block_size=64, **options, **smooth
        )
        out += [value, linear, sum(map(jnp.sum, (*stats, *linear_stats)))]
        out += [jnp.sum(jxent.linear_cross_entropy(hidden, kernel, labels_, bias=bias, reduction="none"))]
    return sum(out)


# One chip and a language model. In both cases the largest part of what is allowed is one array: the float32 sum of
# the kernel's gradient (a quarter of the logits in float32, as the features are of the positions), or the logits of a
# block.
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(("wrt", "most"), [((0, 1), 0.26), ((0,), 0.07)], ids=["both", "frozen kernel"])
def test_default_block(topology, wrt, most):
    positions, features, vocab = 8192, 2048, 151936
    chip = jax.sharding.SingleDeviceSharding(chips(topology)[0])

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

    program = compiled(
        jax.value_and_grad(jxent.linear_cross_entropy, wrt),
        array(positions, features),
        array(features, vocab),
        array(positions, dtype=jnp.int32),
    )
    assert temporaries(program) <= most * 4 * positions * vocab / MIB + room_of_results(program)


def one_chip(f, topology, positions, features, vocab, vocab_axis=-1):
    """The program of a function of hidden states, kernel and labels on one chip."""
    chip = jax.sharding.SingleDeviceSharding(chips(topology)[0])
    kernel = (features, vocab) if vocab_axis else (vocab, features)
    shapes = ((positions, features), jnp.bfloat16), (kernel, jnp.bfloat16), ((positions,), jnp.int32)
    return compiled(f, *(jax.ShapeDtypeStruct(*shape, sharding=chip) for shape in shapes))


def log_prob_and_entropy(*arrays, **options):
    stats = jxent.linear_cross_entropy(*arrays, reduction="none", return_stats=True, **options)[1]
    return stats.log_prob, stats.entropy


@pytest.mark.parametrize("vocab_axis", [-1, 0])
@pytest.mark.parametrize(
    "f",
    [
        jxent.linear_cross_entropy,
        functools.partial(jxent.linear_cross_entropy, label_smoothing=0.1, z_loss_weight=1e-4),
        log_prob_and_entropy,
    ],
    ids=["loss", "smoothing and z-loss", "log-probability and entropy"],
)
def test_no_logits_without_gradients(f, vocab_axis):
    """The reduction of a block is part of its matmul. Each of four blocks reads the kernel once."""
    f = functools.partial(f, vocab_axis=vocab_axis, ignore_index=None)
    program = one_chip(f, "v5e:2x2", 8192, 2048, 151936, vocab_axis)
    assert temporaries(program) <= 64
    assert Program(program.as_text()).work().bytes <= 3e9


@pytest.mark.parametrize(
    ("topology", "options", "most"),
    [("v5e:2x2", {"reduction": "none"}, 180), ("v6e:2x2", {"recompute": True}, 79)],
    ids=["v5e, none", "v6e, recompute"],
)
def test_second_sweep_writes_the_gradient_alone(topology, options, most):
    """Rows come from the first sweep, so that the logits of a block go straight into their 16-bit gradient.

    By the compiler's estimate that takes fewer cycles than gradients in the forward pass: 198 M on a v5e, 91 M on a
    v6e. They need one matmul less, but store float32 logits of smaller blocks.
    """

    def loss(*arrays):
        return jnp.mean(jxent.linear_cross_entropy(*arrays, ignore_index=None, **options))

    program = one_chip(jax.value_and_grad(loss, (0, 1)), topology, 8192, 2048, 151936)
    work = Program(program.as_text()).work()
    assert temporaries(program) <= 1330 + room_of_results(program)
    assert work.bytes <= 28e9
    assert work.cycles <= most * 1e6


def test_default_block_of_fewer_classes():
    """A quarter of the logits in float32, where a quarter of the positions would take half of them."""
    program = one_chip(jax.value_and_grad(jxent.linear_cross_entropy, (0, 1)), "v5e:2x2", 8191, 2048, 50257)
    assert temporaries(program) <= 0.26 * 4 * 8191 * 50257 / MIB + room_of_results(program)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_every_public_function_compiles(topology, dtype):
    chip = jax.sharding.SingleDeviceSharding(chips(topology)[0])

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

    arrays = array(4, 64, 512), array(4, 64, dtype=jnp.int32), array(4, 64, 512), array(512), array(4, 64)
    wrt = (0, 2, 3, 4, 5, 6, 7)
    program = compiled(jax.value_and_grad(everything, wrt), *arrays, array(4, 64, 128), array(128, 512), array(512))
    assert program.as_text()
