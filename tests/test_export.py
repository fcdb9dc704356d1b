"""Programs written to bytes, read by another process, and lowered for other platforms; and no effect in any program."""

import pickle
import subprocess
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grids import short
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jxent

RNG = np.random.default_rng(16)
LOGITS = RNG.normal(size=(6, 10)).astype(np.float32)
HIDDEN, KERNEL = RNG.normal(size=(6, 4)).astype(np.float32), RNG.normal(size=(4, 10)).astype(np.float32)
LABELS = RNG.integers(0, 10, 6)
PROBABILITIES = RNG.dirichlet(np.ones(10), 6).astype(np.float32)
PLATFORMS = ["cpu", "cuda", "rocm", "tpu"]
STATS = {"return_stats": True}


def scalar(function, options, *arrays):
    out = function(*arrays, **options)
    return (jnp.sum(jnp.sin(out[0])), out[1]) if isinstance(out, tuple) else jnp.sum(jnp.sin(out))


def of(function, *arrays, **options):
    return partial(scalar, function, options), arrays


CALLS = {
    "logsumexp": of(jxent.logsumexp, LOGITS),
    "softmax": of(jxent.softmax, LOGITS),
    "log_softmax": of(jxent.log_softmax, LOGITS),
    "nll_loss": of(jxent.nll_loss, LOGITS, LABELS),
    "nll_loss-probabilities": of(jxent.nll_loss, LOGITS, PROBABILITIES),
    "cross_entropy": of(jxent.cross_entropy, LOGITS, LABELS),
    "cross_entropy-probabilities": of(jxent.cross_entropy, LOGITS, PROBABILITIES, **STATS),
    "cross_entropy-stats": of(jxent.cross_entropy, LOGITS, LABELS, **STATS, reduction="none", label_smoothing=0.1),
    "linear_cross_entropy": of(jxent.linear_cross_entropy, HIDDEN, KERNEL, LABELS, block_size=2),
    "sigmoid_cross_entropy": of(jxent.sigmoid_cross_entropy, LOGITS, PROBABILITIES),
    "linear_sigmoid_cross_entropy": of(jxent.linear_sigmoid_cross_entropy, HIDDEN, KERNEL, LABELS, block_size=2),
    "kl_divergence": of(jxent.kl_divergence, LOGITS, PROBABILITIES, temperature=2.0),
    "js_divergence-none": of(jxent.js_divergence, LOGITS, PROBABILITIES, reduction="none"),
    "linear_kl_divergence": of(jxent.linear_kl_divergence, HIDDEN, KERNEL, HIDDEN[:, :3], KERNEL[:3], block_size=2),
    "linear_log_probs": of(jxent.linear_log_probs, HIDDEN, KERNEL, LABELS[:, None], block_size=2),
    "linear_cross_entropy-none": of(jxent.linear_cross_entropy, HIDDEN, KERNEL, LABELS, reduction="none", **STATS),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_effect(name):
    """A program with an effect leaves JAX's fast dispatch, and cannot be serialized."""
    f, arrays = CALLS[name]
    gradient = jax.value_and_grad(f, has_aux=isinstance(jax.eval_shape(f, *arrays), tuple))
    assert not jax.make_jaxpr(jax.jit(f))(*arrays).effects
    assert not jax.make_jaxpr(gradient)(*arrays).effects
    assert not jax.make_jaxpr(jax.vmap(gradient))(*(a[None] for a in arrays)).effects


@pytest.mark.parametrize(
    "name",
    short(
        CALLS,
        *("log_softmax", "nll_loss", "cross_entropy-stats", "sigmoid_cross_entropy", "js_divergence-none"),
        *("linear_cross_entropy", "linear_kl_divergence"),
    ),
)
def test_bytes(name):
    """Serialized for four platforms, read, called: the same bits, and `Stats`. Differentiated, two programs for one."""
    f, arrays = jax.jit(CALLS[name][0]), CALLS[name][1]
    read = jax.export.deserialize(jax.export.export(f, platforms=PLATFORMS)(*arrays).serialize(vjp_order=1))
    out = f(*arrays)
    chex.assert_trees_all_equal(read.call(*arrays), out)
    if isinstance(out, tuple):
        assert isinstance(read.call(*arrays)[1], jxent.Stats)

    def gradient(g):
        return jax.grad(lambda scores: jax.tree.leaves(g(scores, *arrays[1:]))[0])(arrays[0])

    want = gradient(f)
    assert np.any(want)
    chex.assert_trees_all_close(gradient(read.call), want, rtol=1e-6)


SYMBOLIC = {
    "mean": (jxent.linear_cross_entropy, {"block_size": 4}),
    "default block": (jxent.linear_cross_entropy, {}),
    "all": (jxent.linear_cross_entropy, {"block_size": 4, "ignore_index": None}),
    "default block, all": (jxent.linear_cross_entropy, {"ignore_index": None}),
    "none": (jxent.linear_cross_entropy, {"block_size": 4, "reduction": "none", **STATS}),
    "divergence": (jxent.linear_kl_divergence, {"block_size": 4}),
}


@pytest.mark.parametrize("name", short(SYMBOLIC, "mean", "none", "default block, all", "divergence"))
def test_symbolic_shapes(name):
    """One artifact for any number of positions and classes: values, gradients, and their tangents."""
    function, options = SYMBOLIC[name]
    batch, vocab = jax.export.symbolic_shape("batch, vocab")
    divergence = name == "divergence"

    def f(hidden, kernel, labels):
        others = (-hidden, kernel) if divergence else (labels,)
        return scalar(function, options, hidden, kernel, *others)

    def every(*arrays):
        gradients = jax.grad(lambda *arrays: jax.tree.leaves(f(*arrays))[0], (0, 1))
        return f(*arrays), gradients(*arrays), jax.jvp(lambda h: gradients(h, *arrays[1:]), arrays[:1], arrays[:1])[1]

    shapes = (batch, 3, 4), (4, vocab), (batch, 3)
    dtypes = np.float32, np.float32, np.int32
    symbolic = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, dtypes, strict=True)]
    exported = jax.export.export(jax.jit(every), platforms=["cpu", "tpu"])(*symbolic)
    read = jax.export.deserialize(exported.serialize())
    rng = np.random.default_rng(17)
    for length, classes in ((1, 7), (3, 10)):
        hidden, kernel = rng.normal(size=(length, 3, 4)), rng.normal(size=(4, classes))
        labels = np.where(rng.random((length, 3)) < 0.3, -100, rng.integers(0, classes, (length, 3)))
        arrays = [a.astype(dtype) for a, dtype in zip((hidden, kernel, labels), dtypes, strict=True)]
        chex.assert_trees_all_close(read.call(*arrays), jax.jit(every)(*arrays), rtol=1e-5, atol=1e-6)


def test_memory_of_symbolic_shapes():
    """That of blocks, as for concrete shapes."""
    (batch,) = jax.export.symbolic_shape("batch")
    f = jax.jit(jax.value_and_grad(partial(jxent.linear_cross_entropy, block_size=64), (0, 1)))

    def shapes(length):
        dtypes = jnp.float32, jnp.float32, jnp.int32
        return [jax.ShapeDtypeStruct(*a) for a in zip(((length, 8), (8, 1000), (length,)), dtypes, strict=True)]

    def temporaries(f):
        return jax.jit(f).lower(*shapes(1024)).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(jax.export.export(f)(*shapes(batch)).call) <= 1.1 * temporaries(f)


@pytest.mark.parametrize("mode", ["Auto", "Explicit", "named"])
def test_symbolic_shapes_on_a_mesh(mode):
    """JAX cannot call such a program, which may end the process: an error says what to export instead."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType[mode.replace("named", "Auto")],))
    (half,) = jax.export.symbolic_shape("half")
    f = partial(jxent.linear_cross_entropy, batch_axis_name="data" if mode == "named" else None)

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    arrays = array((2 * half, 4), np.float32, "data"), array((4, 10), np.float32), array((2 * half,), np.int32, "data")
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"concrete shapes, got \(2\*half, 4\), .* one device"):
        jax.export.export(jax.jit(f))(*arrays)


def test_stats_need_jxent(tmp_path):
    """Only a process that has loaded it can read an artifact that returns `Stats`; any can read one of a dictionary."""
    f, arrays = CALLS["cross_entropy-stats"]

    def as_dictionary(*arrays):
        loss, stats = f(*arrays)
        return loss, stats._asdict()

    def read(name, function, *before):
        (tmp_path / name).write_bytes(jax.export.export(jax.jit(function))(*arrays).serialize())
        program = "; ".join(
            (*before, "import pathlib, sys, jax.export", "data = pathlib.Path(sys.argv[1]).read_bytes()")
        )
        program += "; jax.export.deserialize(bytearray(data))"
        command = [sys.executable, "-c", program, str(tmp_path / name)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "jxent.Stats" in read("stats", f).stderr
    assert read("stats", f, "import jxent").returncode == 0
    assert read("dictionary", as_dictionary).returncode == 0


def test_train_step_in_another_process(tmp_path):
    """A step of a small model, written to disk: another process, which has no jxent, computes the same bits."""
    optimizer = optax.adamw(1e-2)
    params = {"embed": 0.1 * RNG.normal(size=(50, 8)).astype(np.float32), "mix": np.eye(8, dtype=np.float32)}
    tokens = RNG.integers(0, 50, (4, 12)).astype(np.int32)

    def loss_of(params, tokens):
        hidden = jnp.tanh(params["embed"][tokens] @ params["mix"])
        labels = jxent.next_token_labels(tokens)
        return jxent.linear_cross_entropy(hidden, params["embed"], labels, vocab_axis=0, **STATS)

    # The optimizer's state travels as leaves: its classes are Optax's, which export does not know.
    leaves, tree = jax.tree.flatten((params, optimizer.init(params)))

    @jax.jit
    def step(leaves, tokens):
        params, state = jax.tree.unflatten(tree, leaves)
        (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.leaves((optax.apply_updates(params, updates), state)), loss, jnp.sum(stats.entropy)

    exported = jax.export.export(step, platforms=PLATFORMS)(leaves, tokens)
    (tmp_path / "step").write_bytes(exported.serialize())
    (tmp_path / "arguments").write_bytes(pickle.dumps(jax.tree.map(np.asarray, (leaves, tokens))))
    program = (
        "import pathlib, pickle, sys, jax, jax.export; folder = pathlib.Path(sys.argv[1])\n"
        "step = jax.export.deserialize(bytearray((folder / 'step').read_bytes()))\n"
        "results = step.call(*pickle.loads((folder / 'arguments').read_bytes()))\n"
        "(folder / 'results').write_bytes(pickle.dumps(jax.tree.map(jax.device_get, results)))\n"
        "assert 'jxent' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=tmp_path)
    chex.assert_trees_all_equal(pickle.loads((tmp_path / "results").read_bytes()), step(leaves, tokens))
