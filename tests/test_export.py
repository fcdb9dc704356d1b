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
    "kl_divergence": of(jxent.kl_divergence, LOGITS, PROBABILITIES, temperature=2.0),
    "js_divergence-none": of(jxent.js_divergence, LOGITS, PROBABILITIES, reduction="none"),
    "linear_kl_divergence": of(jxent.linear_kl_divergence, HIDDEN, KERNEL, HIDDEN[:, :3], KERNEL[:3], block_size=2),
    "linear_cross_entropy-none": of(jxent.linear_cross_entropy, HIDDEN, KERNEL, LABELS, reduction="none", **STATS),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_effect(name):
    """A program with an effect leaves JAX's fast dispatch, and cannot be serialized."""
    f, arrays = CALLS[name]
    gradient = jax.value_and_grad(f, has_aux=isinstance(f(*arrays), tuple))
    assert not jax.make_jaxpr(jax.jit(f))(*arrays).effects
    assert not jax.make_jaxpr(gradient)(*arrays).effects
    assert not jax.make_jaxpr(jax.vmap(gradient))(*(a[None] for a in arrays)).effects


@pytest.mark.parametrize("name", CALLS)
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

    assert np.any(gradient(f))
    chex.assert_trees_all_close(gradient(read.call), gradient(f), rtol=1e-6)


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
