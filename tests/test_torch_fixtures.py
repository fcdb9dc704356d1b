"""jxent agrees with PyTorch: values and gradients over the grid of fixtures/export_torch.py.

Each case is checked twice: against PyTorch in the dtype of the case, as closely as PyTorch's own
rounding allows, and against PyTorch in float64 for the same inputs, where jxent has to be right to
a few ulps of the dtype it computes in. `linear_cross_entropy` runs each case in blocks of two kinds,
with the kernel as PyTorch has it and transposed.
"""

import contextlib
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jxent

FIXTURES = Path(__file__).parent / "fixtures"
FILES = ("cross_entropy.npz", "linear_cross_entropy.npz", "nll_loss.npz", "softmax.npz")
OTHERS = ("kl_divergence.npz", "sigmoid_cross_entropy.npz")
LINEAR = "linear_cross_entropy"
LOSSES = ("cross_entropy", "nll_loss", LINEAR)

# Layouts of the kernel: PyTorch's, and its transpose. With each goes a number of positions per block: of the ten that
# there are, 4 makes blocks of neighbours that overlap, 5 strided ones.
LAYOUTS = {"vocab-first": {"vocab_axis": 0, "block_size": 4}, "vocab-last": {"vocab_axis": -1, "block_size": 5}}

# How many roundings PyTorch and jxent may differ by, per unit of the error terms in `allowed`.
ULPS = 8


class Case(NamedTuple):
    """One call of PyTorch, with arrays in the dtypes that it saw and returned."""

    function: str
    topic: str
    dtype: str
    rank: int
    data: str  # names the scores and labels, which cases of one function, topic and rank share
    call: str  # names the rest
    options: dict[str, Any]
    inputs: dict[str, np.ndarray]
    cotangent: np.ndarray | None
    value: np.ndarray
    gradients: dict[str, np.ndarray]

    @property
    def title(self) -> str:
        rank = f"rank {self.rank}"
        return ", ".join((self.function, self.topic, self.dtype, rank, self.data, self.call))


# Reading


def with_arrays(tree: Any, buffers: dict[str, np.ndarray]) -> Any:
    """The tree with each [dtype, offset, shape] replaced by the array that it stands for."""
    if isinstance(tree, dict):
        return {name: with_arrays(leaf, buffers) for name, leaf in tree.items()}
    if not isinstance(tree, list):
        return tree
    dtype, offset, shape, *exact_offset = tree
    size = int(np.prod(shape))
    flat = buffers[dtype][offset : offset + size]
    for start in exact_offset:  # fixtures/export_torch.py says what is stored then
        exact = buffers["float64"][start : start + size]
        with np.errstate(over="ignore"):
            bits = np.where(np.isfinite(exact), exact, 0).astype(np.float32).view(np.uint32)
        bits = bits if dtype == "float32" else (bits >> 16).astype(np.uint16)
        flat = (flat + bits).view(jnp.dtype(dtype))
    return flat.reshape(shape)


def read(path: Path) -> tuple[str, list[Case]]:
    """The version of PyTorch and the cases of a file."""
    with np.load(path) as file:
        buffers = dict(file)
    index = json.loads(buffers.pop("index").tobytes())
    return index["torch"], [Case(**with_arrays(entry, buffers)) for entry in index["cases"]]


CASES = [case for name in FILES for case in read(FIXTURES / name)[1]]


def collected(key: Callable[[Case], Any], cases: list[Case]) -> dict[Any, list[Case]]:
    """The cases by `key`, in order."""
    groups: dict[Any, list[Case]] = {}
    for case in cases:
        groups.setdefault(key(case), []).append(case)
    return groups


FLOAT64 = {case.title: case for case in CASES if case.dtype == "float64"}
GROUPS = collected(lambda case: (case.function, case.topic, case.dtype, case.rank), CASES)
LINEAR_GROUPS = {group: cases for group, cases in GROUPS.items() if group[0] == LINEAR}
LOGITS_GROUPS = {group: cases for group, cases in GROUPS.items() if group[0] != LINEAR}


def in_float64(case: Case) -> Case:
    return FLOAT64[case._replace(dtype="float64").title]


# Running jxent


def class_axis(case: Case) -> int:
    if case.function not in LOSSES:
        return case.options["dim"]
    return 0 if case.rank == 1 else 1


def jxent_options(case: Case) -> dict[str, Any]:
    """The case's options under jxent's names."""
    if case.function == LINEAR:
        return case.options
    if case.function in LOSSES:
        return case.options if case.rank == 1 else case.options | {"axis": 1}
    names = {"dim": "axis", "keepdim": "keepdims"}
    return {names[name]: option for name, option in case.options.items()}


class Call(NamedTuple):
    """What jax.jit needs to know of a case beforehand."""

    function: str
    options: tuple[tuple[str, Any], ...]
    arguments: tuple[str, ...]
    differentiated: tuple[str, ...]
    upstream: str  # the cotangent's name among the arrays


def call_of(case: Case, layout: dict[str, int]) -> Call:
    options = tuple((jxent_options(case) | layout).items())
    upstream = "one" if case.cotangent is None else str(case.cotangent.shape)
    return Call(case.function, options, tuple(case.inputs), tuple(case.gradients), upstream)


# XLA need not optimize what runs once.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}


@partial(jax.jit, static_argnums=0, compiler_options=FAST_TO_COMPILE)
def run_calls(calls: tuple[Call, ...], arrays: dict[str, jax.Array]):
    """Each call's value and gradients; compiling them together takes a fraction of the time."""
    return [run_call(call, arrays) for call in calls]


def run_call(call: Call, arrays: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    def function(differentiated):
        arguments = {name: arrays[name] for name in call.arguments} | differentiated
        optional = {name: arguments.pop(name) for name in ("bias", "class_weight") if name in arguments}
        # What is left, (logits,), (scores, labels) or (hidden, kernel, labels), is in the order of the signature.
        return getattr(jxent, call.function)(*arguments.values(), **optional, **dict(call.options))

    value, pull_back = jax.vjp(function, {name: arrays[name] for name in call.differentiated})
    (gradients,) = pull_back(arrays[call.upstream].astype(value.dtype))
    return value, gradients


def run_jxent(cases: list[Case], **layout: int):
    """The value and gradients of cases that share their data; how PyTorch chunked them makes no difference here."""
    arrays = {"one": np.float32(1)}
    for case in cases:
        arrays |= case.inputs
        arrays |= {} if case.cotangent is None else {str(case.cotangent.shape): case.cotangent}
    calls = [call_of(case, layout) for case in cases]
    once = tuple(dict.fromkeys(calls))
    results = dict(zip(once, run_calls(once, jax.tree.map(jnp.asarray, arrays)), strict=True))
    return [results[call] for call in calls]


def run_linear(cases: list[Case], vocab_axis: int, block_size: int):
    """As `run_jxent`; the kernel and its gradient change their layout on the way in and out."""

    def to_layout(kernel):
        return kernel if vocab_axis == 0 else kernel.T

    moved = [case._replace(inputs=case.inputs | {"kernel": to_layout(case.inputs["kernel"])}) for case in cases]
    for value, gradients in run_jxent(moved, vocab_axis=vocab_axis, block_size=block_size):
        yield value, gradients | {"kernel": to_layout(gradients["kernel"])}


# Comparing


def epsilon(dtype) -> float:
    return float(jnp.finfo(dtype).eps)


def computing_dtype(dtype) -> str:
    """What jxent computes in, and returns losses in."""
    return "float64" if dtype == "float64" else "float32"


def value_dtype(case: Case) -> np.dtype:
    return np.dtype(computing_dtype(case.dtype) if case.function in LOSSES else case.value.dtype)


def as_float64(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def class_scores(case: Case) -> np.ndarray:
    return as_float64(case.inputs["log_probs" if case.function == "nll_loss" else "logits"])


def distance(case: Case) -> np.ndarray:
    """How far each logit is below the largest: exp(-distance) amplifies roundings that much."""
    logits = class_scores(case)
    below = logits.max(class_axis(case), keepdims=True) - logits
    return np.minimum(below, 1e3)  # further away everything underflows to 0


def has_label_mass(case: Case) -> np.ndarray:
    """Whether the gradient p - y of this logit subtracts something."""
    logits, labels = case.inputs["logits"], case.inputs["labels"]
    if case.options["label_smoothing"]:
        return np.ones(logits.shape, bool)
    if case.topic == "probabilities":
        return as_float64(labels) != 0
    axis = class_axis(case)
    return np.moveaxis(labels[..., None] == np.arange(logits.shape[axis]), -1, axis)


def largest(array: np.ndarray | None) -> float:
    return float(np.max(np.abs(as_float64(array)), initial=0.0)) if array is not None else 1.0


class Terms(NamedTuple):
    """The sizes, in a result, that one rounding acts on; see `allowed`."""

    jxent: np.ndarray | float
    torch: np.ndarray | float


def linear_terms(case: Case, name: str, expected: np.ndarray) -> Terms:
    """Of linear_cross_entropy: the value's, or those of a gradient.

    Its logits are exact. So log p and p err by a few roundings of 1 + |log p|, and p (1 + |log p|) < 2: the errors of
    a logit's gradient have the size of the position's coefficient (weight times cotangent). Then come sums over
    classes or positions, of products with the other factor of the matmul. In float64 all of that allows 3e-13, and
    2e-12 for class weights, whose gradient is a sum of -log p of either sign.
    """
    positions = case.inputs["hidden"].size // case.inputs["hidden"].shape[-1]
    coefficient = max(1.0, largest(case.inputs.get("class_weight"))) * max(1.0, largest(case.cotangent))
    total = coefficient if case.options["reduction"] == "mean" else positions * coefficient
    if name == "hidden":
        size = coefficient * np.abs(case.inputs["kernel"]).sum(0).max()
    elif name == "kernel":
        size = total * largest(case.inputs["hidden"])
    elif name in ("value", "bias"):
        size = total + np.abs(expected)
    elif name == "class_weight":
        size = total * (1 + largest(expected))
    else:  # of a label, -log p
        size = coefficient + np.abs(expected)
    return Terms(size, size)


def value_terms(case: Case, expected: np.ndarray) -> Terms:
    size = np.abs(expected)
    if case.function == LINEAR:
        return linear_terms(case, "value", expected)
    if case.function == "softmax":
        return Terms(size * (1 + distance(case)), size * (1 + distance(case)))
    if case.function == "log_softmax":
        # PyTorch takes the log of a sum that 1 is part of: an absolute error, however small log p.
        return Terms(size, size + 1)
    if case.function == "logsumexp":
        # max + log(sum), at most log C apart from the value, may cancel.
        cancelled = size + np.log(case.inputs["logits"].shape[class_axis(case)])
        return Terms(cancelled, cancelled)
    if case.function == "nll_loss":
        return Terms(size, size)
    # Each position's log p has an absolute error in PyTorch; weights and sums carry it along.
    scores = class_scores(case)
    positions = scores.size // scores.shape[class_axis(case)]
    positions = positions if case.options["reduction"] == "sum" else 1
    weight = largest(case.inputs.get("class_weight"))
    return Terms(size, size + positions * weight)


def gradient_terms(case: Case, name: str, expected: np.ndarray) -> Terms:
    size, upstream = np.abs(expected), largest(case.cotangent)
    if case.function == LINEAR:
        return linear_terms(case, name, expected)
    if case.function == "nll_loss":
        return Terms(size, size)
    if name == "labels":  # -log p, so as for the losses
        return Terms(size, size + upstream * largest(case.inputs.get("class_weight")))
    if name == "class_weight":  # a sum over positions, of either sign if the cotangents are
        cancelled = size + expected.size * largest(expected)
        return Terms(cancelled, cancelled)
    size = size * (1 + distance(case))
    if case.function == "logsumexp":
        # PyTorch's exp(x - logsumexp(x)) rounds at the size of the row's offset.
        offset = np.abs(class_scores(case).max(class_axis(case), keepdims=True))
        return Terms(size, size * (1 + offset))
    if case.function in ("softmax", "log_softmax"):  # a sum of cotangents of either sign
        return Terms(size + upstream, size + upstream)
    difference = size + has_label_mass(case) * largest(expected)
    # jxent spells p - 1 as expm1(-loss), and nothing cancels.
    exact = case.topic == "index" and not case.options["label_smoothing"]
    return Terms(size if exact else difference, difference)


def allowed(reference: Case, result_dtype, terms: Terms, expected: np.ndarray) -> np.ndarray:
    """By how much jxent's result may differ from the reference.

    Each library errs by a few roundings, in its own dtype, of the terms its formula adds. On top
    come the rounding of jxent's result to its dtype, where that is narrower, and results so small
    that XLA flushes them to zero.
    """
    computed = epsilon(computing_dtype(result_dtype)) * terms.jxent
    referred = epsilon(reference.value.dtype) * terms.torch
    rounded = epsilon(result_dtype) * np.abs(expected)
    return ULPS * (computed + referred) + rounded + float(jnp.finfo(result_dtype).tiny)


def check(what: str, result: jax.Array, expected: np.ndarray, tolerance: np.ndarray) -> None:
    got, wanted = as_float64(result), as_float64(expected)
    chex.assert_shape(got, wanted.shape, custom_message=what)
    both_nan = np.isnan(got) & np.isnan(wanted)
    with np.errstate(invalid="ignore"):  # inf - inf, where the two are equal
        close = (got == wanted) | both_nan | (np.abs(got - wanted) <= tolerance)
    if not close.all():
        raise AssertionError(
            f"{what}\n  jxent   {got[~close]}\n  PyTorch {wanted[~close]}\n"
            f"  allowed {np.broadcast_to(tolerance, got.shape)[~close]}\n"
            f"  at      {np.argwhere(~close).tolist()}"
        )


def check_case(case: Case, value: jax.Array, gradients: dict[str, jax.Array]) -> None:
    chex.assert_type(value, value_dtype(case), custom_message=case.title)
    for name, gradient in gradients.items():
        what = f"{case.title}: {name}"
        chex.assert_type(gradient, case.inputs[name].dtype, custom_message=what)
    for reference in (case, in_float64(case)):
        expected = as_float64(reference.value)
        what = f"{case.title}: value against {reference.dtype}"
        terms = value_terms(case, expected)
        check(what, value, expected, allowed(reference, value.dtype, terms, expected))
        for name, gradient in gradients.items():
            expected = as_float64(reference.gradients[name])
            what = f"{case.title}: gradient of {name} against {reference.dtype}"
            terms = gradient_terms(case, name, expected)
            check(what, gradient, expected, allowed(reference, gradient.dtype, terms, expected))


def check_group(group: tuple[Any, ...], run: Callable[[list[Case]], Any]) -> None:
    *_, dtype, _ = group
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        for cases in collected(lambda case: case.data, GROUPS[group]).values():
            for case, (value, gradients) in zip(cases, run(cases), strict=True):
                check_case(case, value, gradients)


def groups(table: dict[tuple[Any, ...], list[Case]]):
    return pytest.mark.parametrize(("function", "topic", "dtype", "rank"), table)


@pytest.mark.covering(
    "nll_loss-index-float64-3", "cross_entropy-index-float32-2", "cross_entropy-probabilities-bfloat16-4"
)
@groups(LOGITS_GROUPS)
def test_agrees_with_pytorch(function, topic, dtype, rank):
    check_group((function, topic, dtype, rank), run_jxent)


@pytest.mark.covering
@pytest.mark.parametrize("layout", LAYOUTS)
@groups(LINEAR_GROUPS)
def test_linear_cross_entropy_agrees_with_pytorch(function, topic, dtype, rank, layout):
    check_group((function, topic, dtype, rank), partial(run_linear, **LAYOUTS[layout]))


# Divergences and binary losses


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OTHERS)
def test_others_agree_with_pytorch(name):
    """In float64 to a few ulps of the largest element, in float32 with the float64 case, PyTorch being less exact."""
    _, cases = read(FIXTURES / name)
    wide = {case.title: case for case in cases if case.dtype == "float64"}

    @partial(jax.jit, compiler_options=FAST_TO_COMPILE)
    def answers(inputs, cotangents):
        found = []
        for case, arrays, cotangent in zip(cases, inputs, cotangents, strict=True):

            def function(differentiated, case=case, arrays=arrays):
                arguments = {k: (arrays | differentiated)[k] for k in case.inputs}  # which `jit` has sorted
                optional = {k: arguments.pop(k) for k in ("pos_weight", "sample_weight") if k in arguments}
                return getattr(jxent, case.function)(*arguments.values(), **optional, **case.options)

            value, pull = jax.vjp(function, {k: arrays[k] for k in case.gradients})
            found.append((value, pull(jnp.ones_like(value) if cotangent is None else cotangent)[0]))
        return found

    found = answers([case.inputs for case in cases], [case.cotangent for case in cases])
    for case, (value, gradients) in zip(cases, found, strict=True):
        chex.assert_type(value, case.dtype)
        reference = wide[case._replace(dtype="float64").title]
        tolerance = 32 * epsilon(case.dtype)
        for what, answer, expected in (
            ("value", value, reference.value),
            *((k, gradients[k], gradient) for k, gradient in reference.gradients.items()),
        ):
            check(f"{case.title}: {what}", answer, expected, tolerance * largest(expected))


# The fixtures themselves


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrower_cases_have_the_inputs_of_the_float64_case(dtype):
    for case in (case for case in CASES if case.dtype == dtype):
        wide = in_float64(case)
        for name, array in case.inputs.items():
            np.testing.assert_array_equal(as_float64(array), wide.inputs[name], case.title)
        if case.cotangent is not None:
            np.testing.assert_array_equal(as_float64(case.cotangent), wide.cotangent, case.title)


def load_exporter():
    spec = importlib.util.spec_from_file_location("export_torch", FIXTURES / "export_torch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_case(got: Case, committed: Case, origin: str) -> None:
    assert got.title == committed.title
    assert got.options == committed.options
    chex.assert_trees_all_equal((got.inputs, got.cotangent), (committed.inputs, committed.cotangent))
    # Another processor or release of PyTorch may round otherwise.
    what = f"{committed.title}, {origin}"
    eps = ULPS * epsilon(committed.dtype)
    expected = as_float64(committed.value)
    if committed.topic in ("divergence", "binary"):
        answers = [(got.value, expected), *((got.gradients[k], as_float64(g)) for k, g in committed.gradients.items())]
        for fresh, expected in answers:
            check(what, fresh, expected, eps * (largest(expected) + 1))
        return
    terms = value_terms(committed, expected)
    check(what, got.value, expected, eps * terms.torch)
    for name, gradient in committed.gradients.items():
        expected = as_float64(gradient)
        terms = gradient_terms(committed, name, expected)
        check(f"{what}, {name}", got.gradients[name], expected, eps * terms.torch)


@pytest.mark.parametrize("name", [*FILES, *OTHERS])
def test_fixtures_are_what_the_script_exports(name, tmp_path):
    pytest.importorskip("torch", reason="exporting the fixtures anew needs PyTorch")
    exporter = load_exporter()
    exporter.export(tmp_path, [name])
    version, fresh = read(tmp_path / name)
    committed_version, committed = read(FIXTURES / name)
    origin = f"exported by PyTorch {version} against {committed_version}"
    for got, case in zip(fresh, committed, strict=True):
        assert_same_case(got, case, origin)
