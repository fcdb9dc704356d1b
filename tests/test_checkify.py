"""`checkify` names bad values: labels out of range, numbers that are not finite, and labels that are no probabilities.

Without `checkify` its checks cost nothing and have no effect.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_calls import LABELS, LINEAR, LOGITS, LOSSES, PROBABILITIES, C, N, floats, good, loss_of
from bad_labels import BAD, BAD_LABELS, OPTION_SETS, OPTIONS, with_label
from jax.experimental import checkify

import jxent
from jxent._core import reports


def checked(call):
    return checkify.checkify(call, errors=checkify.user_checks)


def summed_loss(function, **options):
    def loss(scores, labels):
        out = loss_of(function)(scores, labels, **options)
        return jnp.sum(out[0] if options.get("return_stats") else out)

    return loss


def over_examples(call):
    return jax.vmap(call, in_axes=(0, 0))


def scanned(call):
    """The sum over positions, one at a time."""
    return lambda scores, labels: jax.lax.scan(lambda s, xs: (s + call(*xs), None), 0.0, (scores, labels))[0]


CHECKED = {
    "eager": checked,
    "checkify-of-jit": lambda call: checked(jax.jit(call)),
    "jit-of-checkify": lambda call: jax.jit(checked(call)),
    "grad": lambda call: checked(jax.grad(call)),
    "jit-of-grad": lambda call: jax.jit(checked(jax.value_and_grad(call))),
    "vmap": lambda call: checked(over_examples(call)),
    "vmap-of-grad": lambda call: checked(over_examples(jax.grad(call))),
    "scan": lambda call: checked(scanned(call)),
    "checkpoint": lambda call: checked(jax.grad(jax.checkpoint(call))),
}


# --- labels out of range ----------------------------------------------------------------------------------------------


def assert_names_label(error, function, label):
    said = rf"^{function}: label {label} is out of range for {C} classes, at \[({BAD})?\]"
    with pytest.raises(checkify.JaxRuntimeError, match=said):
        error.throw()


@pytest.mark.covering
@pytest.mark.parametrize(
    ("function", "how"),
    [
        *((function, how) for function in LOSSES for how in CHECKED),
        *((LINEAR, how) for how in ("eager", "jit-of-grad", "vmap-of-grad", "checkpoint")),
    ],
)
def test_checkify_names_the_label(function, how):
    run = CHECKED[how](summed_loss(function))
    error, _ = run(jnp.asarray(LOGITS), with_label(-1, "int32"))
    assert_names_label(error, function, -1)
    error, _ = run(jnp.asarray(LOGITS), with_label(C - 1, "int32"))
    assert error.get() is None


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [d for d in BAD_LABELS if d != "int64"])
@pytest.mark.parametrize("function", LOSSES)
def test_checkify_in_each_dtype(function, dtype):
    run = jax.jit(checked(summed_loss(function)))
    for label in BAD_LABELS[dtype]:
        assert_names_label(run(LOGITS, with_label(label, dtype))[0], function, label)
    assert run(LOGITS, with_label(0, dtype))[0].get() is None


@pytest.mark.parametrize("function", LOSSES)
def test_checkify_in_int64(function, x64):
    run = jax.jit(checked(summed_loss(function)))
    for label in BAD_LABELS["int64"]:
        assert_names_label(run(LOGITS, with_label(label, "int64"))[0], function, label)


@pytest.mark.covering
@pytest.mark.parametrize(("function", "options"), OPTION_SETS)
def test_checkify_with_each_option(function, options):
    run = jax.jit(checked(summed_loss(function, **OPTIONS[function][options])))
    assert_names_label(run(LOGITS, with_label(C, "int32"))[0], function, C)
    assert run(LOGITS, with_label(C - 1, "int32"))[0].get() is None


@pytest.mark.parametrize("function", LOSSES)
def test_checkify_with_torch_layout(function):
    """The number of classes is the size of the class axis."""
    run = jax.jit(checked(summed_loss(function, axis=0)))
    assert_names_label(run(LOGITS.T, with_label(C, "int32"))[0], function, C)
    assert run(LOGITS.T, with_label(C - 1, "int32"))[0].get() is None


@pytest.mark.parametrize("function", LOSSES)
def test_checkify_leaves_excluded_labels_alone(function):
    where = jnp.arange(N) != BAD
    assert checked(summed_loss(function, where=where))(LOGITS, with_label(C, "int32"))[0].get() is None
    assert checked(summed_loss(function))(LOGITS, with_label(-100, "int32"))[0].get() is None
    assert checked(summed_loss(function, ignore_index=C))(LOGITS, with_label(C, "int32"))[0].get() is None
    assert checked(summed_loss(function))(LOGITS[:0], LABELS[:0])[0].get() is None


# --- other bad values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_checkify_names_a_value_that_is_not_finite(function, value):
    """The error says where the value is. A position that does not count has none, and -inf in logits masks a class."""
    name = {**LOSSES, LINEAR: "hidden"}[function]
    scores = LOGITS.copy()
    scores[BAD, 3] = value
    for how in ("eager", "jit-of-grad", "vmap"):
        run = CHECKED[how](summed_loss(function))
        error, _ = run(scores, jnp.asarray(LABELS))
        if value == -np.inf and function != LINEAR:
            assert error.get() is None
        else:
            with pytest.raises(checkify.JaxRuntimeError, match=rf"^{function}: {name} has {value} at \[{BAD} 3\]"):
                error.throw()
    run = checked(summed_loss(function, where=jnp.arange(N) != BAD))
    assert run(scores, jnp.asarray(LABELS))[0].get() is None


@pytest.mark.parametrize("name", ["kernel", "bias"])
def test_checkify_names_parameters_that_are_not_finite(name):
    arrays = {**good(LINEAR), "bias": floats(C)}
    arrays[name] = arrays[name].at[..., 4].set(jnp.nan)
    index = r"\[0 4\]" if name == "kernel" else r"\[4\]"
    error, _ = checked(jxent.linear_cross_entropy)(**arrays)
    with pytest.raises(checkify.JaxRuntimeError, match=rf"^{LINEAR}: {name} has nan at {index}"):
        error.throw()
    if name == "bias":  # -inf masks a class
        assert checked(jxent.linear_cross_entropy)(**arrays | {"bias": floats(C).at[4].set(-jnp.inf)})[0].get() is None


@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_checkify_names_labels_that_are_no_probabilities(function):
    """Positions that do not count have no error. Rounded probabilities have none either."""
    loss, where = summed_loss(function), np.arange(N) != BAD
    run, run_masked = jax.jit(checked(loss)), jax.jit(checked(summed_loss(function, where=where)))
    runs = run, jax.jit(checked(over_examples(loss))), jax.jit(checked(jax.grad(loss)))

    def named(change, said):
        bad = PROBABILITIES.copy()
        bad[BAD] = change(bad[BAD])
        for run in runs:
            with pytest.raises(checkify.JaxRuntimeError, match=rf"^{function}: labels {said}"):
                run(LOGITS, bad)[0].throw()
        assert run_masked(LOGITS, bad)[0].get() is None

    named(lambda row: np.where(np.arange(C) == 3, np.nan, row), rf"has nan at \[{BAD} 3\]")
    named(lambda row: np.where(np.arange(C) == 3, -0.25, row), rf"are .* one is -0\.25, at \[{BAD} 3\]")
    named(lambda row: 0.75 * row, rf"are .* sum to 0\.75\d* instead of 1, at \[{BAD}\]")
    for dtype in ("float16", "bfloat16", "float32"):
        assert run(LOGITS, jnp.asarray(PROBABILITIES, dtype))[0].get() is None


def test_checkify_where_masks_are_mapped():
    """Examples may share logits or masks. A position that no example counts is not reported."""
    logits = LOGITS.copy()
    logits[BAD, 3] = np.nan
    masks = np.arange(N) != np.array([[BAD], [0]])

    def loss(logits, where):
        return jxent.cross_entropy(logits, LABELS, where=where)

    def error(in_axes, *arrays):
        return checked(jax.vmap(loss, in_axes))(*arrays)[0].get()

    assert f"logits has nan at [{BAD} 3]" in error((None, 0), logits, masks)
    assert error((None, 0), logits, masks[[0, 0]]) is None
    both = np.stack([LOGITS, logits])
    with jax.numpy_rank_promotion("raise"):
        assert f"logits has nan at [1 {BAD} 3]" in error((0, None), both, masks[1])
    assert f"logits has nan at [1 {BAD} 3]" in error((0, -1), both, masks[[0, 1]].T)
    assert error((0, None), both, masks[0]) is None


def test_checkify_counts_no_position_beyond_an_int32():
    """For 2**32 logits, the first bad position is searched axis by axis."""
    shapes = jax.ShapeDtypeStruct((2**20, 2**12), jnp.float32), jax.ShapeDtypeStruct((2**20,), jnp.int32)
    program = str(jax.make_jaxpr(checkify.checkify(jxent.cross_entropy))(*shapes))
    assert "bool[1048576,4096]" in program
    assert str(2**32) not in program


# --- without checkify -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [LABELS, PROBABILITIES], ids=["index", "probabilities"])
@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_without_checkify_the_check_costs_nothing(function, labels, monkeypatch):
    """The check is in the jaxpr, without an effect. The compiled program has nothing of it."""
    call = jax.jit(summed_loss(function))
    traced = call.trace(LOGITS, labels)
    assert "jxent_reported" in str(traced.jaxpr)
    assert not traced.jaxpr.effects
    jax.clear_caches()
    monkeypatch.setattr(reports.reported_p, "bind", lambda through, *_, **__: through)
    unchecked = call.trace(LOGITS, labels)
    assert "jxent_reported" not in str(unchecked.jaxpr)
    assert unchecked.lower().compile().cost_analysis() == traced.lower().compile().cost_analysis()
    jax.clear_caches()


@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_unchecked_calls_work_where_effects_do_not(function):
    """Under transformations that refuse effects, a label out of range raises nothing and gives NaN."""
    call = summed_loss(function)
    labels = with_label(C, "int32")
    assert np.isnan(scanned(call)(jnp.asarray(LOGITS), labels))
    np.testing.assert_array_equal(np.isnan(over_examples(call)(LOGITS, labels)), np.arange(N) == BAD)
    assert np.isnan(jax.grad(jax.checkpoint(call))(LOGITS, labels)[BAD]).all()
    # `jax.export` refuses unordered effects that it does not know.
    exported = jax.export.export(jax.jit(call))(LOGITS, labels)
    assert np.isnan(exported.call(LOGITS, labels))
    assert np.isfinite(exported.call(LOGITS, with_label(0, "int32")))
