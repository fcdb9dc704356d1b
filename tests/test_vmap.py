"""`jax.vmap` over every array argument of every function, alone and in pairs, while the others are shared.

Gradients of the mapped function, gradients mapped, and second derivatives are compared with a loop over the examples,
in float64. The cases are a table of all functions and of the kinds of labels.

The cause of such faults is tested for itself, in all programs of the table: a value must take what its tangent takes.
"""

import functools
from collections.abc import Callable, Mapping
from itertools import combinations
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import short
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

import jxent

EXAMPLES, POSITIONS, CLASSES, FEATURES = 2, 4, 4, 2
ARRAYS = {  # name -> how to draw an example
    "logits": lambda rng: rng.normal(size=(POSITIONS, CLASSES)),
    "hidden": lambda rng: rng.normal(size=(POSITIONS, FEATURES)),
    "kernel": lambda rng: rng.normal(size=(FEATURES, CLASSES)),
    "bias": lambda rng: rng.normal(size=CLASSES),
    "labels": lambda rng: rng.permutation([1, 3, 0, -100]),
    "probabilities": lambda rng: rng.dirichlet(np.ones(CLASSES), POSITIONS),
    "indices": lambda rng: rng.integers(0, CLASSES, (POSITIONS, 2)),
    "shares": lambda rng: rng.dirichlet(np.ones(2), POSITIONS),
    "class_weight": lambda rng: rng.uniform(0.5, 2, CLASSES),
    "sample_weight": lambda rng: rng.uniform(0.5, 2, POSITIONS),
    "where": lambda rng: rng.permutation([True, True, True, False]),
    "label_smoothing": lambda rng: rng.uniform(0.1, 0.3),
    "z_loss_weight": lambda rng: rng.uniform(0.1, 0.3),
    "temperature": lambda rng: rng.uniform(0.5, 2),
    "temperatures": lambda rng: rng.uniform(0.5, 2, POSITIONS),
    "pos_weight": lambda rng: rng.uniform(0.5, 2, CLASSES),
    "where_class": lambda rng: rng.permuted(np.tile([True, True, True, False], (POSITIONS, 1)), axis=-1),
    "where_logit": lambda rng: rng.random((POSITIONS, CLASSES)) < 0.7,
    "weight_of_logit": lambda rng: rng.uniform(0.5, 2, (POSITIONS, CLASSES)),
}
LIKE = {"logits_p": "logits", "hidden_p": "hidden", "kernel_p": "kernel", "bias_p": "bias", "yes": "probabilities"}


class Case(NamedTuple):
    function: Callable
    positional: tuple[str, ...]
    keywords: Mapping[str, str]  # keyword of the function -> name of the array
    options: Mapping[str, Any] = MappingProxyType({})


def keywords(*names, **renamed):
    return {name: name for name in names} | renamed


POSITIONAL = keywords("sample_weight", "where")
ALL = keywords("class_weight", "sample_weight", "where", "label_smoothing", "z_loss_weight")
LINEAR = ALL | keywords("bias")
OF_P, OF_Q = ("hidden_p", "kernel_p"), ("hidden", "kernel")
OF_BOTH = POSITIONAL | keywords("bias_p", "temperature", bias_q="bias")
STATS = {"return_stats": True}
CASES = {
    "logsumexp": Case(jxent.logsumexp, ("logits",), keywords(where="where_class")),
    "softmax": Case(jxent.softmax, ("logits",), keywords(where="where_class")),
    "log_softmax": Case(jxent.log_softmax, ("logits",), keywords(where="where_class")),
    "nll-index": Case(jxent.nll_loss, ("logits", "labels"), POSITIONAL | keywords("class_weight")),
    "nll-probability": Case(jxent.nll_loss, ("logits", "probabilities"), POSITIONAL | keywords("class_weight")),
    "nll-sparse": Case(jxent.nll_loss, ("logits", "sparse"), POSITIONAL),
    "plain": Case(jxent.cross_entropy, ("logits", "labels"), keywords("where")),
    "index": Case(jxent.cross_entropy, ("logits", "labels"), ALL),
    "probability": Case(jxent.cross_entropy, ("logits", "probabilities"), ALL),
    "sparse": Case(jxent.cross_entropy, ("logits", "sparse"), ALL),
    "stats": Case(jxent.cross_entropy, ("logits", "labels"), POSITIONAL | keywords("temperature"), STATS),
    "stats-probability": Case(jxent.cross_entropy, ("logits", "probabilities"), POSITIONAL, STATS),
    "linear-index": Case(jxent.linear_cross_entropy, (*OF_Q, "labels"), LINEAR),
    "linear-none": Case(
        *(jxent.linear_cross_entropy, (*OF_Q, "labels"), LINEAR | keywords(temperature="temperatures")),
        {"reduction": "none"},
    ),
    "linear-stats": Case(jxent.linear_cross_entropy, (*OF_Q, "labels"), POSITIONAL, STATS | {"reduction": "sum"}),
    "linear-probability": Case(jxent.linear_cross_entropy, (*OF_Q, "probabilities"), LINEAR, {"block_size": 2}),
    "linear-sparse": Case(jxent.linear_cross_entropy, (*OF_Q, "sparse"), POSITIONAL, {"recompute": True}),
    "kl": Case(jxent.kl_divergence, ("logits_p", "logits"), POSITIONAL | keywords("temperature")),
    "js": Case(
        jxent.js_divergence, ("logits_p", "logits"), POSITIONAL | keywords(temperature="temperatures"), {"beta": 0.3}
    ),
    "tv": Case(jxent.tv_distance, ("logits_p", "logits"), POSITIONAL | keywords(temperature="temperatures")),
    "linear-kl": Case(jxent.linear_kl_divergence, (*OF_P, *OF_Q), OF_BOTH),
    "linear-js": Case(jxent.linear_js_divergence, (*OF_P, *OF_Q), OF_BOTH, {"reduction": "none"}),
    "linear-tv": Case(jxent.linear_tv_distance, (*OF_P, *OF_Q), OF_BOTH),
    "log-probs": Case(
        jxent.linear_log_probs, (*OF_Q, "indices"), keywords("where", "bias", "temperature"), {"block_size": 2}
    ),
    "top-k": Case(
        jxent.linear_top_k, OF_Q, keywords("where", "bias", temperature="temperatures"), {"k": 2, "logit_softcap": 3.0}
    ),
    "linear-sigmoid": Case(
        jxent.linear_sigmoid_cross_entropy,
        (*OF_Q, "labels"),
        POSITIONAL | keywords("bias", "label_smoothing", pos_weight="class_weight"),
    ),
    "linear-sigmoid-sparse": Case(jxent.linear_sigmoid_cross_entropy, (*OF_Q, "sparse"), POSITIONAL),
    "sigmoid": Case(
        jxent.sigmoid_cross_entropy,
        ("logits", "yes"),
        keywords("pos_weight", "label_smoothing", sample_weight="weight_of_logit", where="where_logit"),
    ),
}
LEFT_OUT = ("linear-sigmoid-sparse", "linear-kl", "linear-js", "linear-tv", "tv")


def names_of(case):
    names = [*case.positional, *case.keywords.values()]
    return [part for name in names for part in (("indices", "shares") if name == "sparse" else (name,))]


def call(case, arrays):
    """A scalar of all that the function returns and that has gradients, with coefficients that differ."""
    arrays = arrays | {"sparse": jxent.SparseLabels(arrays.get("indices"), arrays.get("shares"))}
    given = {keyword: arrays[name] for keyword, name in case.keywords.items()}
    out = case.function(*(arrays[name] for name in case.positional), **given, **case.options)
    loss, stats = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    parts = [loss] if stats is None else [loss, stats.log_prob, stats.log_normalizer, stats.entropy]
    if isinstance(out, jxent.ClassLogProbs):
        parts = [out.log_probs, out.log_rest]
    return sum(jnp.vdot(jnp.cos(jnp.arange(part.size) + i), part.ravel()) for i, part in enumerate(parts))


def drawn(names):
    """name -> (EXAMPLES, ...), floating point arrays apart from others."""
    rng = np.random.default_rng(5)
    arrays = {name: np.stack([ARRAYS[LIKE.get(name, name)](rng) for _ in range(EXAMPLES)]) for name in names}
    floats = {name: jnp.asarray(a) for name, a in arrays.items() if np.issubdtype(a.dtype, np.floating)}
    return floats, {name: jnp.asarray(a) for name, a in arrays.items() if name not in floats}


def derivatives(order, total, floats, directions):
    """The gradient, and for order 2 the second derivative along the directions, in two orders of the modes."""

    def pushed(floats):
        return jax.jvp(total, (floats,), (directions,))[1]

    if order == 1:
        return {"gradient": jax.grad(total)(floats)}
    gradient, product = jax.jvp(jax.grad(total), (floats,), (directions,))
    return {"gradient": gradient, "forward over reverse": product, "reverse over forward": jax.grad(pushed)(floats)}


@functools.cache
def of_example(name, order):
    """The program of `derivatives` of one example."""

    def program(floats, rest, directions):
        return derivatives(order, lambda floats: call(CASES[name], floats | rest), floats, directions)

    return jax.jit(program)


SWEEPS = "linear", "log-probs", "top-k"  # how the names of these cases begin; they take long to trace and compile


def mapped_sets():
    """Every argument alone, with derivatives of both orders; and every pair of them, with gradients.

    Second derivatives and pairs of linear losses are those of one case each. The short run has no second derivatives of
    sweeps, no linear divergences, and no total variation distance.
    """
    for name, case in CASES.items():
        names = names_of(case)
        pairs = () if name.startswith("linear") and name != "linear-index" else combinations(names, 2)
        for mapped in (*((n,) for n in names), *pairs):
            second = not name.startswith("linear") or name == "linear-none"
            for order in (1, 2) if len(mapped) == 1 and second else (1,):
                slow = len(mapped) == 2 or (order == 2 and name.startswith(SWEEPS)) or name in LEFT_OUT
                marks = pytest.mark.exhaustive if slow else ()
                yield pytest.param(name, mapped, order, id=f"{name}-{'+'.join(mapped)}-{order}", marks=marks)


@pytest.mark.covering("plain-where-2", "kl-where-1", "index-where-1", "stats-labels-1", "sparse-indices-1")
@pytest.mark.parametrize(("name", "mapped", "order"), list(mapped_sets()))
def test_vmap_is_a_loop(name, mapped, order, x64):
    floats, rest = drawn(names_of(CASES[name]))

    def shared(arrays):
        """Those that are not mapped, as the first example has them."""
        return {key: array if key in mapped else array[0] for key, array in arrays.items()}

    def example(arrays, i):
        return {key: array[i] if key in mapped else array for key, array in arrays.items()}

    floats, rest = shared(floats), shared(rest)
    directions = {key: jnp.cos(array) for key, array in floats.items()}
    axes = [{key: 0 if key in mapped else None for key in arrays} for arrays in (floats, rest)]
    weights = jnp.arange(1.0, EXAMPLES + 1)

    def value(floats, rest):
        return call(CASES[name], floats | rest)

    @jax.jit
    def program(floats, rest, directions):
        def total(floats):
            return jnp.vdot(weights, jax.vmap(value, axes)(floats, rest))

        return derivatives(order, total, floats, directions), jax.vmap(jax.grad(value), axes)(floats, rest)

    of_total, of_each = program(floats, rest, directions)
    loop = [
        of_example(name, order)(*(example(arrays, i) for arrays in (floats, rest, directions))) for i in range(EXAMPLES)
    ]
    for key in floats:
        for what, got in of_total.items():
            want = np.stack([weight * of_one[what][key] for weight, of_one in zip(weights, loop, strict=True)])
            assert_close(got[key], want if key in mapped else want.sum(0), f"{what} by {key}")
        want = np.stack([of_one["gradient"][key] for of_one in loop])
        assert np.any(want), key
        assert_close(of_each[key], want, f"of each example, by {key}")


def assert_close(got, want, what):
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12, err_msg=what)


# --- values and tangents ----------------------------------------------------------------------------------------------


def dependences(jaxpr):
    """For each output, the places of the inputs that it depends on."""
    places = {variable: frozenset([i]) for i, variable in enumerate(jaxpr.invars)}

    def of(variable):
        return frozenset() if isinstance(variable, Literal) else places.get(variable, frozenset())

    for eqn in jaxpr.eqns:
        every = [frozenset().union(*map(of, eqn.invars))] * len(eqn.outvars)
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in ("jit", "custom_jvp_call"):  # which may ignore some of their operands
            every = [frozenset().union(*(of(eqn.invars[i]) for i in taken)) for taken in dependences(inner.jaxpr)]
        places |= dict(zip(eqn.outvars, every, strict=True))
    return [of(variable) for variable in jaxpr.outvars]


def equations(jaxpr):
    """All of the jaxpr and of those inside of it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: isinstance(leaf, ClosedJaxpr)):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                yield from equations(getattr(inner, "jaxpr", inner))


def ignored(eqn):
    """(result, operands) of a `custom_jvp` function, where a tangent takes operands that the value ignores."""
    number = len(eqn.invars)
    still = [not jnp.issubdtype(variable.aval.dtype, jnp.floating) for variable in eqn.invars]
    try:
        rule, _, zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(*still)
    except TypeError as error:
        if "NoneType" in str(error):  # x - m before log Z is known, which nothing differentiates
            return
        raise
    operands = [*range(number), *(i for i in range(number) if not still[i])]  # of primals and tangents
    constants = len(rule.invars) - len(operands)
    of_values = dependences(eqn.params["call_jaxpr"].jaxpr)
    of_tangents = iter(dependences(rule)[len(of_values) :])
    for i, (taken, is_zero) in enumerate(zip(of_values, zeros, strict=True)):
        by_tangent = frozenset() if is_zero else {operands[k - constants] for k in next(of_tangents)}
        if by_tangent - taken:
            yield f"result {i}", sorted(by_tangent - taken)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.exhaustive if n.startswith(SWEEPS) else ()) for n in CASES]
)
def test_values_take_what_their_tangents_take(name, x64):
    floats, rest = drawn(names_of(CASES[name]))
    directions = {key: jnp.cos(array) for key, array in floats.items()}

    def program(floats, rest, directions):
        def total(floats):
            return call(CASES[name], floats | rest)

        return total(floats), derivatives(2, total, floats, directions)

    # Under `jax.vmap` the blocks of a linear loss are part of the program, too.
    jaxpr = jax.make_jaxpr(jax.vmap(program))(floats, rest, directions).jaxpr
    rules = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "custom_jvp_call"]
    faults = [(eqn.params["call_jaxpr"].jaxpr.debug_info.func_name, *fault) for eqn in rules for fault in ignored(eqn)]
    assert rules
    assert not faults


NESTED = {"plain": "where", "probability": "where", "sparse": "shares", "nll-probability": "where", "kl": "where"}


@pytest.mark.parametrize("name", short((*NESTED, "js", "sigmoid", "linear-none"), "probability", "sparse", "kl"))
def test_one_vmap_around_another(name, x64):
    """The inner one over the first array, the outer one over an array that a value may ignore."""
    floats, rest = drawn(names_of(CASES[name]))
    inner = "hidden" if name.startswith("linear") else "logits"
    outer = "where_logit" if name == "sigmoid" else NESTED.get(name, "where")
    arrays = {key: a if key in (inner, outer) else a[0] for key, a in (floats | rest).items()}

    def of_example(x, y):
        return call(CASES[name], arrays | {inner: x, outer: y})

    def mapped(x):
        return jnp.sum(jax.vmap(lambda y: jax.vmap(lambda x: of_example(x, y))(x))(arrays[outer]))

    def loop(x):
        return sum(of_example(x[i], y) for y in arrays[outer] for i in range(EXAMPLES))

    x = arrays[inner]
    got, want = (jax.jit(functools.partial(derivatives, 2, f))(x, jnp.cos(x)) for f in (mapped, loop))
    for what in got:
        assert_close(got[what], want[what], what)
