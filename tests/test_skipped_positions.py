"""Positions that do not count take no blocks of `linear_cross_entropy` and its kin, and everything else is the same."""

from collections import Counter
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiling import optimized
from grids import short
from hlo import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modes import differentiated

import jxent
from jxent._sweep import order

B, L, D, C = 4, 60, 3, 5
BLOCK = 80  # of 240 positions, in steps of 64 where few count
RNG = np.random.default_rng(0)
HIDDEN, KERNEL, BIAS = RNG.normal(size=(B, L, D)), RNG.normal(size=(D, C)), RNG.normal(size=C)
LABELS = RNG.integers(0, C, (B, L))
MASKS = {
    "none": np.zeros((B, L), bool),
    "one": np.arange(B * L).reshape(B, L) == 77,
    "answers": np.arange(L) >= np.array([[60], [50], [57], [31]]),
    "scattered": RNG.random((B, L)) < 0.4,
    "most": RNG.random((B, L)) < 0.9,
    "all": np.ones((B, L), bool),
}


@pytest.mark.parametrize("size", [1, 5, 16, 40])
@pytest.mark.parametrize("step_size", [1, 2, 5, 16])
def test_every_position_that_counts_is_in_one_block(size, step_size):
    """In no more blocks than it takes: full ones, and of the last one what there is in smaller steps."""
    step_size = min(size, step_size)

    def step(rows, carry):
        visits, full, small = carry
        visits = visits.at[rows].add(1, mode="drop")
        return visits, full + (rows.size == size), small + (rows.size != size)

    @jax.jit
    def visit(keep):
        ordered = order.order_of(keep, size)
        return order.by_blocks(ordered, size, step_size, step, (jnp.zeros(keep.size, int), 0, 0))

    for mask in MASKS.values():
        keep = mask[:, :10]
        visits, full, small = visit(keep)
        np.testing.assert_array_equal(visits.reshape(keep.shape), keep)
        count = keep.sum()
        assert full == (count + step_size - 1) // size
        assert small == max(0, -(-(count - full * size) // step_size))
        assert count <= full * size + small * step_size < count + step_size


def loss(module, arrays, mask, by_labels=False, **options):
    """Of `jxent`, or of `reference` by full logits."""
    labels = LABELS
    if by_labels:
        labels = np.where(mask, labels, -100)
    else:
        options["where"] = mask
    if module is jxent:
        return jxent.linear_cross_entropy(*arrays[:2], labels, bias=arrays[2], block_size=BLOCK, **options)
    options.pop("recompute", None)
    return reference.cross_entropy(arrays[0] @ arrays[1] + arrays[2], labels, **options)


ARRAYS = tuple(map(np.asarray, (HIDDEN, KERNEL, BIAS)))
MODES = ("", "r", "f", "rf", "fr")


@pytest.mark.usefixtures("x64")
@pytest.mark.covering("scattered-none-False-True-r", "answers-mean-False-False-fr")
@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("by_labels", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", MASKS)
def test_equals_full_logits(name, reduction, recompute, by_labels, modes):
    options = {"by_labels": by_labels, "reduction": reduction, "recompute": recompute}
    if name == "none" and reduction == "mean":
        modes = ""  # NaN, and gradients of 0: see below
    at = jax.tree.map(jnp.asarray, ARRAYS)

    def of(module, *at):
        return loss(module, at, MASKS[name], **options)

    found, wanted = (differentiated(partial(of, module), modes)(*at) for module in (jxent, reference))
    chex.assert_trees_all_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_positions_without_a_weight_are_computed():
    """What docs/benchmarks/skipping.md says to do for the time of all positions: the same loss, by one loop."""
    mask, options = MASKS["answers"], {"vocab_axis": 1, "block_size": BLOCK}
    f = partial(jxent.linear_cross_entropy, HIDDEN.astype(np.float32), KERNEL.astype(np.float32), **options)
    weighed = jax.jit(
        lambda mask: f(jnp.where(mask, LABELS, 0), sample_weight=mask.astype(jnp.float32), ignore_index=None)
    )
    np.testing.assert_allclose(weighed(mask), f(LABELS, where=mask), rtol=1e-6)
    assert "known_trip_count" in optimized(weighed).lower(mask).compile().as_text()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_they_hold_reaches_nothing(reduction):
    """One program for all masks, whatever the positions hold that do not count; their gradients are zeros."""
    traces = []

    @jax.jit
    def f(arrays, mask):
        traces.append(mask)
        value, pull = jax.vjp(lambda *at: loss(jxent, at, mask, reduction=reduction), *arrays)
        return value, pull(jnp.ones_like(value))

    for mask in MASKS.values():
        hidden = np.where(mask[..., None], HIDDEN, np.nan).astype(np.float32)
        arrays = hidden, KERNEL.astype(np.float32), BIAS.astype(np.float32)
        value, grads = f(arrays, mask)
        np.testing.assert_array_equal(grads[0][~mask], 0)
        chex.assert_tree_all_finite(grads)
        assert np.isnan(value).any() == (reduction == "mean" and not mask.any())
    assert len(traces) == 1


OTHERS = {
    "statistics": lambda at, where: jxent.linear_cross_entropy(
        *at[:2], LABELS, where=where, block_size=BLOCK, reduction="none", return_stats=True
    ),
    "probabilities": lambda at, where: jxent.linear_cross_entropy(
        *at[:2], jax.nn.softmax(HIDDEN @ KERNEL), where=where, block_size=BLOCK, label_smoothing=0.1, z_loss_weight=0.1
    ),
    "sparse labels": lambda at, where: jxent.linear_cross_entropy(
        *at[:2],
        jxent.SparseLabels(np.stack([LABELS, (LABELS + 1) % C], -1), np.full((B, L, 2), 0.5)),
        where=where,
        block_size=BLOCK,
    ),
    "log-probabilities": lambda at, where: jxent.linear_log_probs(
        *at[:2], np.stack([LABELS, (LABELS + 1) % C], -1), where=where, block_size=BLOCK
    ),
    "top k": lambda at, where: jxent.linear_top_k(*at[:2], 3, where=where, block_size=BLOCK),
    "KL": lambda at, where: jxent.linear_kl_divergence(*at[:2], jnp.cos(at[0]), at[1], where=where, block_size=BLOCK),
    "TV": lambda at, where: jxent.linear_tv_distance(*at[:2], jnp.cos(at[0]), at[1], where=where, block_size=BLOCK),
    "yes or no": lambda at, where: jxent.linear_sigmoid_cross_entropy(
        *at[:2], LABELS, where=where, pos_weight=2.0, block_size=BLOCK, reduction="none"
    ),
    "JS": lambda at, where: jxent.linear_js_divergence(*at[:2], jnp.cos(at[0]), at[1], where=where, block_size=BLOCK),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", short(OTHERS, "statistics", "sparse labels", "KL", "yes or no"))
@pytest.mark.parametrize("mask", short(MASKS, "answers"))
def test_other_losses(mask, name):
    """As by blocks of all positions, which are those of `jax.vmap`."""
    at, keep = jax.tree.map(jnp.asarray, ARRAYS), MASKS[mask]

    def total(where, at):
        out = OTHERS[name](at, where)
        floats = [a for a in jax.tree.leaves(out) if jnp.issubdtype(a.dtype, jnp.floating)]
        return sum(jnp.sum(jnp.sin(a)) for a in floats if a.shape != () or name != "statistics")

    found = jax.grad(lambda at: jnp.where(keep.any(), total(keep, at), 0.0))
    wanted = jax.grad(lambda at: jnp.where(keep.any(), jax.vmap(partial(total, at=at))(keep[None])[0], 0.0))
    chex.assert_trees_all_close(jax.jit(found)(at), jax.jit(wanted)(at), rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_vmap():
    """Over examples that have masks of their own, and over kernels with one mask for all."""
    masks = np.stack([MASKS[name] for name in ("none", "one", "scattered")])
    kernels = jnp.stack([KERNEL, 2 * KERNEL, -KERNEL])
    at = jnp.asarray(HIDDEN), jnp.asarray(BIAS)

    def f(module, kernel, mask):
        return jax.value_and_grad(lambda k: loss(module, (at[0], k, at[1]), mask, reduction="sum"))(kernel)

    for axes, mask in ((0, 0), masks), ((0, None), MASKS["scattered"]):
        found, wanted = (jax.jit(jax.vmap(partial(f, module), axes))(kernels, mask) for module in (jxent, reference))
        chex.assert_trees_all_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.covering
@pytest.mark.parametrize(
    "specs", [(P("data"), P()), (P("data"), P(None, "vocab")), (P(None, "data"), P(None, "vocab"))]
)
@pytest.mark.parametrize("mode", ["Explicit", "Auto", "shard_map"])
def test_vmap_on_a_mesh(mode, specs):
    """Over examples with masks of their own, that are sharded or whose positions are: by loops of known length."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "vocab"), axis_types=(AxisType["Explicit" if mode == "Explicit" else "Auto"],) * 2
    )
    arrays = HIDDEN, np.concatenate([KERNEL, KERNEL[:, :1]], 1), LABELS, MASKS["answers"]
    placed_as = specs[0], specs[1], specs[0], specs[0]

    def example(hidden, kernel, labels, where, **options):
        return jxent.linear_cross_entropy(hidden, kernel, labels, where=where, block_size=8, reduction="sum", **options)

    def total(hidden, kernel, labels, where, **options):
        per_example = jax.vmap(partial(example, **options), (0, None, 0, 0))
        return jnp.sum(jnp.sin(per_example(hidden, kernel, labels, where)))

    def mapped(*arrays):
        over = "data" if "data" in specs[0][:1] else None
        named = partial(total, axis_name="vocab" if "vocab" in specs[1] else None)
        return jax.lax.psum(named(*arrays), over) if over else named(*arrays, batch_axis_name="data")

    f = mapped if mode == "shard_map" else total
    if mode == "shard_map":
        f = jax.shard_map(mapped, mesh=mesh, in_specs=placed_as, out_specs=P())
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, placed_as, strict=True)]
        program = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*placed).compile()
        found = jax.tree.map(np.asarray, program(*placed))
    wanted = jax.value_and_grad(total, (0, 1))(*map(jnp.asarray, arrays))
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, wanted), rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["Auto", "Explicit", "shard_map"])
def test_devices_with_masks_of_their_own(mode):
    """Two devices of four share the positions; of the "answers" one has 4 times as many as the other."""
    kind = AxisType.Explicit if mode == "Explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "vocab"), axis_types=(kind,) * 3)
    specs = P("data", "sequence"), P(None, "vocab"), P("data", "sequence"), P("data", "sequence")
    kernel = np.concatenate([KERNEL, KERNEL[:, :1]], 1)

    def f(hidden, kernel, labels, mask, **options):
        return jxent.linear_cross_entropy(hidden, kernel, labels, where=mask, block_size=2 * BLOCK, **options)

    def mapped(*arrays):
        named = partial(f, axis_name="vocab", batch_axis_name=("data", "sequence"))
        return jax.shard_map(named, mesh=mesh, in_specs=specs, out_specs=P())(*arrays)

    for mask in MASKS.values():
        arrays = tuple(map(jnp.asarray, (HIDDEN, kernel, LABELS, mask)))
        wanted = jax.value_and_grad(f, (0, 1))(*arrays)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]
            found = jax.jit(jax.value_and_grad(mapped if mode == "shard_map" else f, (0, 1)))(*placed)
        chex.assert_trees_all_close(jax.tree.map(np.asarray, found), wanted, rtol=1e-11, atol=1e-12)


def lengths_are_known(text, *kernels):
    """Whether it is of the loop, or the two, that carries the gradient of a kernel of these types."""
    loops = [line for line in text.splitlines() if " while(" in line and any(kernel in line for kernel in kernels)]
    known = ["known_trip_count" in line for line in loops]
    assert known in ([True], [False], [False, False])
    return known[0]


@pytest.mark.covering
@pytest.mark.parametrize("way", ["Auto", "Explicit", "named"])
@pytest.mark.parametrize(
    ("hidden", "kernel"), [(P("data"), P()), (P("data"), P("data")), (P("data"), P("data", "vocab"))]
)
def test_one_number_more_crosses_the_devices(hidden, kernel, way):
    """What may be skipped adds no collective but the largest count, before the loop, where classes are sharded too."""
    vocab = "vocab" in kernel
    axes = {"data": 4, "vocab": 2} if vocab else {"data": 8}
    kind = AxisType.Explicit if way == "Explicit" else AxisType.Auto
    mesh = jax.make_mesh((*axes.values(),), (*axes,), axis_types=(kind,) * len(axes))
    kernel_shapes = "f32[16,48]" if vocab else "f32[16,96]", "f32[4,48]", "f32[2,96]"
    names = {"batch_axis_name": "data", "axis_name": "vocab" if vocab else None} if way == "named" else {}
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((8, 128, 16), jnp.float32, hidden),
            ((16, 96), jnp.float32, kernel),
            ((8, 128), jnp.int32, hidden),
        )
    ]

    def moved(**options):
        loss = partial(jxent.linear_cross_entropy, block_size=16 * axes["data"], reduction="sum", **names, **options)
        gradients = jax.value_and_grad(loss, (0, 1))
        shardings = NamedSharding(mesh, P()), tuple(array.sharding for array in arrays[:2])
        with jax.set_mesh(mesh):
            text = jax.jit(gradients, out_shardings=shardings).lower(*arrays).compile().as_text()
        assert lengths_are_known(text, *kernel_shapes) == (options != {})
        return Counter((c.kind, c.size, c.in_loop) for c in collectives(text))

    without = moved(ignore_index=None)
    assert sum(without.values()) > 0
    assert moved() == without + Counter({("all-reduce", 1, False): 1} if vocab else {})


def test_loops_of_dynamic_length():
    """Two of them have three matmuls each; neither is there where nothing can be excluded or one block is all."""
    shapes = ((512, 8), jnp.float32), ((8, 100), jnp.float32), ((512, 100), jnp.float32), ((512,), bool)
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def program(*given, block_size=128):
        def of(hidden, kernel, labels, where=None):
            return jxent.linear_cross_entropy(hidden, kernel, labels, where=where, block_size=block_size)

        return optimized(jax.value_and_grad(of, (0, 1))).lower(*given).compile()

    for given, dots, known in ((arrays[:3], 3, True), (arrays, 6, False)):
        text = program(*given).as_text()
        assert text.count(" dot(") == dots
        assert lengths_are_known(text, "f32[8,100]", "f32[100,8]") == known
    one_block = program(*arrays, block_size=512)
    assert one_block.as_text().count(" dot(") == 3
    assert " while(" not in one_block.as_text()


# --- positions whose cotangents are all 0: the backward pass skips them ----------------------------------------------

WEIGHTS = np.where(MASKS["scattered"], RNG.normal(size=(B, L)), 0.0)


def weighed(module, way, hidden, kernel, weights):
    """A sum of losses, or of statistics, with weights of which most are 0."""
    if way == "KL":
        arrays = (hidden, kernel, jnp.cos(hidden), kernel)
        of_each = (
            jxent.linear_kl_divergence(*arrays, reduction="none", block_size=BLOCK)
            if module is jxent
            else reference.kl_divergence(arrays[0] @ arrays[1], arrays[2] @ arrays[3], reduction="none")
        )
        return jnp.sum(weights * of_each)
    options = {"sample_weight": weights, "reduction": "sum"} if way == "recompute" else {"reduction": "none"}
    options["return_stats"] = way == "statistics"
    if module is jxent:
        options |= {"block_size": BLOCK, "recompute": way == "recompute", "ignore_index": None}
        out = jxent.linear_cross_entropy(hidden, kernel, LABELS, **options)
    else:
        out = reference.cross_entropy(hidden @ kernel, LABELS, **options)
    if way == "recompute":
        return out
    return jnp.sum(weights * (out if way == "none" else jnp.sin(out[1].log_prob) + out[1].entropy))


@pytest.mark.usefixtures("x64")
@pytest.mark.covering("none-rr", "statistics-fr")
@pytest.mark.parametrize("modes", ["r", "f", "rr", "rf", "fr"])
@pytest.mark.parametrize("way", ["none", "recompute", "statistics", "KL"])
def test_zero_cotangents_equal_full_logits(way, modes):
    """Also derivatives by the cotangents: where a cotangent is 0, its derivative is not."""
    at = tuple(map(jnp.asarray, (HIDDEN, KERNEL, WEIGHTS)))
    found, wanted = (
        jax.jit(differentiated(partial(weighed, module, way), modes))(*at) for module in (jxent, reference)
    )
    chex.assert_trees_all_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("way", ["none", "recompute", "statistics", "KL"])
def test_zero_cotangents_take_no_blocks(way):
    """One program for all weights has two loops without a known length: full blocks, smaller steps. NaN is not 0."""
    arrays = [jnp.asarray(a, jnp.float32) for a in (HIDDEN, KERNEL, WEIGHTS)]
    program = jax.jit(jax.grad(partial(weighed, jxent, way), (0, 1))).lower(*arrays).compile()
    loops = [line for line in program.as_text().splitlines() if " while(" in line]
    assert len([line for line in loops if "known_trip_count" not in line]) == 2
    hidden = jnp.where(WEIGHTS[..., None] == 0, jnp.nan, arrays[0])
    if way == "none":  # the other cotangents are made of what the position holds
        chex.assert_trees_all_close(program(hidden, *arrays[1:]), program(*arrays), rtol=1e-5, atol=1e-6)
    with_nan = program(*arrays[:2], arrays[2].at[0, 0].set(jnp.nan))
    assert np.isnan(with_nan[0][0, 0]).all()
    assert np.isnan(with_nan[1]).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["Auto", "Explicit", "shard_map"])
def test_devices_with_zero_cotangents_of_their_own(mode):
    kind = AxisType.Explicit if mode == "Explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "vocab"), axis_types=(kind,) * 3)
    specs = P("data", "sequence"), P(None, "vocab"), P("data", "sequence"), P("data", "sequence")
    kernel = np.concatenate([KERNEL, KERNEL[:, :1]], 1)

    def f(hidden, kernel, labels, weights, **options):
        options |= {"block_size": 2 * BLOCK, "reduction": "none"}
        return jnp.sum(weights * jxent.linear_cross_entropy(hidden, kernel, labels, **options))

    def mapped(*arrays):
        def on_each(*arrays):
            return jax.lax.psum(f(*arrays, axis_name="vocab"), ("data", "sequence"))

        return jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=P())(*arrays)

    for mask in (MASKS["answers"], MASKS["none"]):
        arrays = tuple(map(jnp.asarray, (HIDDEN, kernel, LABELS, np.where(mask, np.cos(LABELS), 0.0))))
        wanted = jax.value_and_grad(f, (0, 1))(*arrays)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]
            found = jax.jit(jax.value_and_grad(mapped if mode == "shard_map" else f, (0, 1)))(*placed)
        chex.assert_trees_all_close(jax.tree.map(np.asarray, found), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [False, True])
def test_shards_of_the_classes_with_zero_cotangents_of_their_own(check_vma):
    """Each of two shards takes the losses of every other position. Both must compute the same blocks."""
    mesh = jax.make_mesh((2,), ("vocab",), axis_types=(AxisType.Auto,))
    specs, kernel = (P(), P(None, "vocab")), jnp.asarray(np.concatenate([KERNEL, KERNEL[:, :1]], 1))

    def losses(hidden, kernel, **options):
        return jxent.linear_cross_entropy(hidden, kernel, LABELS, reduction="none", block_size=BLOCK, **options)

    def on_each(*arrays):
        mine = np.arange(L) % 2 == jax.lax.axis_index("vocab")
        return jax.lax.psum(jnp.sum(jnp.where(mine, WEIGHTS * losses(*arrays, axis_name="vocab"), 0)), "vocab")

    mapped = jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    found = jax.jit(jax.grad(mapped, (0, 1)))(jnp.asarray(HIDDEN), kernel)
    wanted = jax.jit(jax.grad(lambda *arrays: jnp.sum(WEIGHTS * losses(*arrays)), (0, 1)))(jnp.asarray(HIDDEN), kernel)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, found), wanted, rtol=1e-11, atol=1e-12)
