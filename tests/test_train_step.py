"""Whole training steps on meshes: those of one device, whatever the model, its shardings and the way to say them."""

import contextlib
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from grids import short
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from train_step import Rules, Step, shapes_of, update_of

pytestmark = pytest.mark.usefixtures("x64")

LAYOUTS = {
    "batch": ({"data": 8}, Rules(batch="data")),
    "FSDP": ({"data": 8}, Rules(batch="data", embed="data")),
    "FSDP and vocabulary": ({"data": 4, "model": 2}, Rules(batch="data", embed="data", vocab="model", mlp="model")),
    "FSDP of the vocabulary": ({"data": 8}, Rules(batch="data", vocab="data")),
    "sequence": ({"data": 4, "sequence": 2}, Rules(batch="data", length="sequence", embed="data")),
}
MODELS = {
    "tied": {},
    "untied": {"tied": False},
    "scan": {"scan": True, "tied": False},
    "accumulation": {"accumulate": 2, "batch": 16},
}
STEPS = 3


def tokens_of(step):
    shape = (step.accumulate, step.batch // step.accumulate, step.length)
    tokens = np.random.default_rng(17).integers(0, step.vocab, (STEPS, *shape)).astype(np.int32)
    return tokens[:, 0] if step.accumulate == 1 else tokens


def trained(step, rules, mesh, mesh_in_use):
    """(the losses, the state) of three steps. A step is compiled as users do: state donated, and sharded as it was."""
    graph, shapes, of_tokens = shapes_of(step, rules, mesh)
    initial, update = update_of(step)
    state = jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), initial(rules, 0)[1], shapes)
    with jax.set_mesh(mesh) if mesh_in_use else contextlib.nullcontext():
        shardings = jax.tree.map(lambda a: a.sharding, shapes), NamedSharding(mesh, P())
        program = jax.jit(partial(update, graph), donate_argnums=0, out_shardings=shardings)
        losses = []
        for tokens in tokens_of(step):
            state, loss = program(state, jax.device_put(tokens, of_tokens.sharding))
            losses.append(loss)
    return jax.device_get((losses, nnx.to_pure_dict(state)))


def mesh_of(mode, axes):
    devices = np.array(jax.devices()[: int(np.prod([*axes.values()]))])
    return Mesh(devices.reshape([*axes.values()]), tuple(axes), axis_types=(AxisType[mode],) * len(axes))


CASES = [
    ("tied", "FSDP and vocabulary", "named"),
    ("scan", "FSDP", "untold"),
    ("untied", "sequence", "named"),
    ("accumulation", "FSDP and vocabulary", "named"),
    ("accumulation", "sequence", "by the arrays"),
    ("tied", "FSDP of the vocabulary", "named"),
    ("untied", "FSDP of the vocabulary", "by the arrays"),
    ("scan", "batch", "Explicit"),
    ("tied", "FSDP and vocabulary", "Explicit"),
]


@pytest.mark.parametrize(("model", "layout", "way"), short(CASES, *CASES[:2]))
def test_three_steps(model, layout, way):
    """Losses, parameters and the optimizer's state of one device."""
    step = Step(dtype=jnp.float64, param_dtype=jnp.float64, named=way == "named", **MODELS[model])
    axes, rules = LAYOUTS[layout]
    mesh = mesh_of("Explicit" if way == "Explicit" else "Auto", axes)
    actual = trained(step, rules, mesh, way != "by the arrays")
    wanted = trained(step._replace(named=False), Rules(), mesh_of("Auto", {"data": 1}), False)
    assert len(set(map(float, wanted[0]))) == STEPS
    chex.assert_trees_all_close(actual, wanted, rtol=1e-10, atol=1e-10)
