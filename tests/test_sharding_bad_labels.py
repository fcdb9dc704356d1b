"""Bad labels in sharded arrays: NaN at their own position, and `checkify` names them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import short
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from sharded_calls import ARRAYS, CALLS, LABELS, SPECS, VOCAB, mesh_of, put
from sharded_layouts import LAYOUTS, specs_of

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "linear"])
def test_labels_out_of_range_on_shards(name):
    """A wrapped or clamped index would fall on some shard."""
    labels = LABELS.copy()
    labels[1, :4] = [-1, -8, VOCAB, VOCAB + 8]
    function, names, _ = CALLS[name]
    f = jax.shard_map(
        partial(function, axis_name="vocab", reduction="none"),
        mesh=mesh_of("Auto", vocab=8),
        in_specs=tuple(SPECS.get(a, P()) for a in names),
        out_specs=P(),
    )
    arrays = [jnp.asarray(labels if a == "labels" else ARRAYS[a]) for a in names]
    losses, pull = jax.vjp(jax.jit(f), *arrays)
    bad = np.zeros_like(labels, bool)
    bad[1, :4] = True
    np.testing.assert_array_equal(np.isnan(losses), bad)
    np.testing.assert_array_equal(np.isnan(pull(jnp.ones_like(losses))[0]).all(-1), bad)
    error, _ = jax.jit(checkify.checkify(f, errors=checkify.user_checks))(*arrays)
    with pytest.raises(checkify.JaxRuntimeError, match=rf"label -1 is out of range for {VOCAB} classes, at \[1 0\]"):
        error.throw()


@pytest.mark.covering("linear-Explicit", "cross_entropy-probabilities-Auto")
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    "name",
    short(
        ("cross_entropy", "cross_entropy-probabilities", "nll_loss", "linear"), "cross_entropy-probabilities", "linear"
    ),
)
def test_checkify_on_meshes(name, mode):
    """The error names the bad array and the position. Under `vmap` the position starts with the example."""
    function, names, options = CALLS[name]
    # checkify does not support a `shard_map` over some axes of a mesh, so it reports nothing under `vmap`.
    alone = name == "linear" and mode == "Explicit"
    mesh, specs = mesh_of(mode, **LAYOUTS["batch, sequence, vocabulary"][0]), specs_of("batch, sequence, vocabulary")
    in_axes = [0 if specs[a][:1] == ("data",) else None for a in names]

    def of_examples(*arrays):
        return jnp.sum(jax.vmap(partial(function, **options), in_axes)(*arrays))

    calls = partial(function, **options), of_examples, jax.grad(of_examples)
    checked = [jax.jit(checkify.checkify(call, errors=checkify.user_checks)) for call in calls]

    def errors(arrays):
        arrays = [put(mesh, arrays[a], specs[a]) for a in names]
        # On `Explicit` axes JAX cannot read the error of a program with a `shard_map`, unless it is on the host.
        return [jax.device_get(call(*arrays)[0]) for call in checked]

    bad = {name: ARRAYS[name].copy() for name in ("labels", "probabilities")}
    bad["labels"][1, 2] = VOCAB
    bad["probabilities"][1, 2] *= 2
    said = rf"label {VOCAB} is out of range .* at \[1 2\]" if "labels" in names else r"sum to 2\.0 .* at \[1 2\]"
    for error in errors(ARRAYS):
        assert error.get() is None
    for number, error in enumerate(errors(ARRAYS | bad)):
        if alone and number > 0:
            assert error.get() is None
            continue
        with pytest.raises(checkify.JaxRuntimeError, match=said):
            error.throw()
