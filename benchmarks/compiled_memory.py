"""What the losses hold, from compiled programs: `compiled.py memory` and `compiled.py post-training`."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import objectives
import platforms
from hlo import Program
from peers import optional
from platforms import ONE_LOOP, arguments, compiled, linear, temporaries
from report import MIB, table

import jxent

SIZES = ((8191, 256, 50257), (8192, 1024, 151936), (4096, 1024, 131072))
SMALL = ((1023, 32, 5003),)


def memory(platform, smoke):
    """The tables of one loss, one after the other."""
    device, sizes = platforms.one_device(platform), SMALL if smoke else SIZES
    heads = "positions x features x vocab", "dtype", "logits in float32", "Optax, full logits"
    table((*heads, "jxent", "", "frozen", ""), by_size(sizes, device))

    args = arguments(*sizes[0], jnp.float32)
    print(f"\n{name_of(sizes[0])}, float32")
    table(("`block_size`", "hidden and kernel", "frozen kernel"), by_block_size(args, device))
    table(("reduction", "temporaries", "kept between the passes"), by_reduction(args, device))
    heads = "", 'reduction="mean"', '"none"', "matmuls of both"
    table(heads, by_derivative(args, device, most=3 if smoke else None))  # compiling the others takes a minute

    size = (255, 32, 5003) if smoke else (2048, 256, 32000)
    print(f"\n{name_of(size)}, float32")
    table(("value and gradients", "temporaries", "matmuls"), by_statistics(arguments(*size, jnp.float32), device))
    heads = "", "positions x features x classes", "values", "with gradients"
    table(heads, by_loss(device, smoke), texts=2)


def name_of(size):
    return " x ".join(map(str, size))


def mib(size):
    return f"{size / MIB:,.0f} MiB"


def held(loss, args, device, wrt=(0, 1)):
    """Temporaries of the value and the gradients."""
    return temporaries(compiled(jax.value_and_grad(loss, wrt), args, device))


def matmuls(program):
    return str(Program(program.as_text()).matmuls())


def by_size(sizes, device):
    for size in sizes:
        for dtype in (jnp.float32, jnp.bfloat16):
            args = arguments(*size, dtype)
            full, ours = held(optax_of_full_logits, args, device), held(linear(), args, device)
            frozen = held(linear(), args, device, (0,))
            shares = mib(ours), f"{ours / full:.1%}", mib(frozen), f"{frozen / full:.1%}"
            yield name_of(size), jnp.dtype(dtype).name, mib(4 * size[0] * size[2]), mib(full), *shares


def optax_of_full_logits(hidden, kernel, labels):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return jnp.mean(optional("optax").softmax_cross_entropy_with_integer_labels(logits, labels))


def by_block_size(args, device):
    for block_size in (64, 256, 1024, len(args[-1])):
        loss = linear(block_size=block_size)
        yield block_size, mib(held(loss, args, device)), mib(held(loss, args, device, (0,)))


def by_reduction(args, device):
    losses = {
        '`"mean"`': linear(),
        '`"mean"`, `recompute=True`': linear(recompute=True),
        '`"none"`': linear(reduction="none"),
    }
    for name, loss in losses.items():
        yield name, mib(held(loss, args, device)), mib(kept(loss, args))


def kept(loss, args, wrt=(0, 1)):
    """Bytes that the forward pass leaves for the backward pass, the arguments themselves aside."""

    def pull(*args):
        return jax.vjp(lambda *chosen: loss(*chosen, *args[len(wrt) :]), *args[: len(wrt)])[1]

    jaxpr = jax.make_jaxpr(pull)(*args).jaxpr
    kept = [v.aval for v in jaxpr.outvars if not any(v is argument for argument in jaxpr.invars)]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in kept)


def by_derivative(args, device, most):
    for name in list(derivatives_of(linear()))[:most]:
        losses = [linear(reduction=reduction, **o) for o in ({}, ONE_LOOP) for reduction in ("mean", "none")]
        mean, none, *one_loop = (compiled(derivatives_of(f)[name], (*args, *args[:2]), device) for f in losses)
        yield name, mib(temporaries(mean)), mib(temporaries(none)), ", ".join(map(matmuls, one_loop))


def derivatives_of(loss):
    """Name -> function of hidden states, kernel, labels, and a tangent of each of the first two."""

    def of(labels):
        return lambda hidden, kernel: loss(hidden, kernel, labels)

    def tangent(h, k, y, dh, dk):
        return jax.jvp(of(y), (h, k), (dh, dk))[1]

    return {
        "loss": lambda h, k, y, dh, dk: loss(h, k, y),
        "`jax.grad`": lambda h, k, y, dh, dk: jax.grad(of(y), (0, 1))(h, k),
        "`jax.jvp`": lambda h, k, y, dh, dk: jax.jvp(of(y), (h, k), (dh, dk)),
        "`jax.jvp` of the hidden states alone": lambda h, k, y, dh, dk: jax.jvp(lambda h: loss(h, k, y), (h,), (dh,)),
        "`jax.jvp` of `jax.grad`": lambda h, k, y, dh, dk: jax.jvp(jax.grad(of(y), (0, 1)), (h, k), (dh, dk))[1],
        "`jax.grad` of `jax.jvp`": lambda *a: jax.grad(tangent, (0, 1))(*a),
    }


def by_statistics(args, device):
    for name, (reported, options) in STATISTICS.items():
        loss = partial(with_statistics, reported, **options)
        program = compiled(jax.value_and_grad(loss, (0, 1), has_aux=True), args, device)
        yield name, mib(temporaries(program)), matmuls(program)


STATISTICS = {  # name -> (whether they are only reported, options)
    "mean, log-probabilities only reported": (True, {}),
    "mean, entropy differentiated": (False, {}),
    "mean with `recompute=True`, entropy differentiated": (False, {"recompute": True}),
    '`reduction="none"`, reduced by hand, entropy differentiated': (False, {"reduction": "none"}),
}


def with_statistics(reported, hidden, kernel, labels, **options):
    """(loss, what is reported)."""
    loss, stats = jxent.linear_cross_entropy(hidden, kernel, labels, return_stats=True, **ONE_LOOP, **options)
    if reported:
        return loss, jnp.mean(stats.log_prob)
    return jnp.mean(loss) + 0.01 * jnp.mean(stats.entropy), None


def by_loss(device, smoke):
    """Losses of other arguments, in float32."""
    for name, (size, make) in list(LOSSES.items())[: 2 if smoke else None]:
        size = SMALL[0] if smoke else size
        f, args, wrt = make(*size)

        def total(*args, f=f):
            return sum(map(jnp.sum, jax.tree.leaves(f(*args))))

        yield name, name_of(size), mib(temporaries(compiled(f, args, device))), mib(held(total, args, device, wrt))


def of_classes(positions, features, vocab):
    hidden, kernel, _ = arguments(positions, features, vocab, jnp.float32)
    indices = jax.ShapeDtypeStruct((positions, TOP), jnp.int32)
    return jxent.linear_log_probs, (hidden, kernel, indices), (0, 1)


def of_top_k(*size):
    return partial(jxent.linear_top_k, k=TOP), arguments(*size, jnp.float32)[:2], (0, 1)


def of_pairs(loss, pairs, features, texts):
    image, text = (jax.ShapeDtypeStruct((n, features), jnp.float32) for n in (pairs, texts))
    number = jax.ShapeDtypeStruct((), jnp.float32)
    return loss, (image, text, number, number), (0, 1, 2, 3)


def siglip(image, text, log_scale, bias):
    labels = jnp.arange(len(image))
    options = {"vocab_axis": 0, "bias": jnp.full(len(text), bias)}
    return jxent.linear_sigmoid_cross_entropy(jnp.exp(log_scale) * image, text, labels, **options)


def siglip_of_full_logits(image, text, log_scale, bias):
    logits = jnp.exp(log_scale) * image @ text.T + bias
    return -jnp.sum(jax.nn.log_sigmoid((2 * jnp.eye(*logits.shape) - 1) * logits)) / len(image)


def of_heads(loss, positions, features, vocab):
    hidden, kernel, labels = arguments(positions, features, vocab, jnp.float32)
    hidden, labels = (jax.ShapeDtypeStruct((HEADS, *a.shape), a.dtype) for a in (hidden, labels))
    return loss, (hidden, kernel, labels), (0, 1)


def in_several_calls(hidden, kernel, labels):
    return sum(jxent.linear_cross_entropy(h, kernel, y) for h, y in zip(hidden, labels, strict=True))


TOP, HEADS = 64, 3
LOSSES = {  # name -> size, and what makes of a size the function, its arguments, and those with a gradient
    "`linear_log_probs`, 64 classes": (SIZES[0], of_classes),
    "SigLIP": ((8192, 256, 8192), partial(of_pairs, siglip)),
    "SigLIP, `jax.nn`, full logits": ((8192, 256, 8192), partial(of_pairs, siglip_of_full_logits)),
    "`linear_top_k`, 64 classes": (SIZES[0], of_top_k),
    "3 heads, one call": ((8192, 256, 32000), partial(of_heads, jxent.linear_cross_entropy)),
    "3 heads, three calls": ((8192, 256, 32000), partial(of_heads, in_several_calls)),
}


# --- post-training: as Liger's own benchmark --------------------------------------------------------------------------

# Positions -> (Liger, PyTorch) in MiB: the peak that PyTorch allocated on an H100 (JSD) and on an A100 (GRPO), from
# benchmark/data/all_benchmark_data.csv of liger-kernel 0.8.5, rows of versions 0.3.1 and 0.6.1.
LIGER = {
    "JSD": {1024: (4652, 10609), 2048: (5232, 17146), 4096: (6392, 30220), 8192: (8712, 56368)},
    "GRPO": {2048: (7345, 9083), 4096: (7409, 13138), 8192: (7536, 21250), 16384: (7793, 37475)},
}
POST_TRAINING = {  # with jxent, and with full logits
    "JSD": (objectives.js, objectives.js_of_full_logits),
    "GRPO": tuple(partial(objectives.grpo, f) for f in (objectives.log_probs, objectives.log_probs_of_full_logits)),
}


def post_training(platform, smoke):
    device = platforms.one_device(platform)
    features, vocab = (64, 5003) if smoke else (4096, 128256)

    def held(loss, positions):
        """MiB of arguments, results and temporaries of the value and the gradients of the model that is trained."""
        hidden, _, labels = arguments(positions, features, vocab, jnp.bfloat16)
        kernel = jax.ShapeDtypeStruct((vocab, features), jnp.bfloat16)
        program = compiled(jax.value_and_grad(loss, (2, 3)), (hidden, kernel, hidden, kernel, labels), device)
        found = program.memory_analysis()
        return (found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes) / MIB

    def rows():
        for name, published in LIGER.items():
            for positions, theirs in published.items():
                ours, full = (f"{held(loss, positions):,.0f}" for loss in POST_TRAINING[name])
                liger, torch = ("", "") if smoke else (f"{n:,}" for n in theirs)  # which are of the full size
                yield name, positions, ours, liger, full, torch

    print(f"{features} features, {vocab} classes, bfloat16; MiB of arguments, gradients and temporaries")
    table(("loss", "positions", "jxent", "Liger", "`jax.nn`, full logits", "PyTorch, full logits"), rows())
