"""Layouts of losses under `jax.jit`: how a mesh shards their arrays, and what a program may then move.

A layout has a name and is one for every call of sharded_calls.py.
"""

import jax
import numpy as np
from hlo import collectives
from jax.sharding import PartitionSpec as P
from sharded_calls import (
    ARRAYS,
    BLOCK,
    CALLS,
    COTANGENTS,
    HIDDEN,
    KERNEL,
    SOFTMAXES,
    mesh_of,
    put,
    value_and_grad,
)

# name: (mesh, spec of the hidden states, spec of the kernel)
LAYOUTS: dict[str, tuple] = {
    "batch": ({"data": 8}, P("data"), P()),
    "batch and sequence": ({"data": 4, "sequence": 2}, P("data", "sequence"), P()),
    "vocabulary": ({"vocab": 8}, P(), P(None, "vocab")),
    "batch, sequence, vocabulary": (
        {"data": 2, "sequence": 2, "vocab": 2},
        P("data", "sequence"),
        P(None, "vocab"),
    ),
    "FSDP": ({"data": 8}, P("data"), P("data")),
    "FSDP and vocabulary": ({"data": 4, "vocab": 2}, P("data"), P("data", "vocab")),
    "FSDP of the vocabulary": ({"data": 8}, P("data"), P(None, "data")),
    "sequence and vocabulary on one axis": ({"data": 4, "model": 2}, P("data", "model"), P(None, "model")),
    "features": ({"data": 4, "model": 2}, P("data", None, "model"), P("model")),
    "vocabulary, then FSDP of it": ({"data": 4, "vocab": 2}, P("data"), P(None, ("vocab", "data"))),
    "FSDP of the vocabulary, and it": ({"data": 4, "vocab": 2}, P("data"), P(None, ("data", "vocab"))),
}
NAMED_LAYOUTS = (
    *("batch, sequence, vocabulary", "FSDP and vocabulary"),
    *("FSDP of the vocabulary", "vocabulary, then FSDP of it"),
)
# What a program gathers and scatters, apart from sums: (kind, elements on one device).
SCATTERED = ("reduce-scatter", KERNEL.size // 8)
MOVED = {
    "FSDP": [("all-gather", KERNEL.size), SCATTERED],
    "FSDP and vocabulary": [("all-gather", KERNEL.size // 2), SCATTERED],
    "FSDP of the vocabulary": [("all-gather", KERNEL.size), SCATTERED],
    "sequence and vocabulary on one axis": [("all-gather", HIDDEN.size // 4)],
    "features": [("all-gather", HIDDEN.size // 4), ("all-gather", KERNEL.size)],
    "vocabulary, then FSDP of it": [("all-gather", KERNEL.size // 2), SCATTERED],
    "FSDP of the vocabulary, and it": [("all-gather", KERNEL.size), ("reduce-scatter", KERNEL.size // 4)],
}


def specs_of(layout):
    """The specs of all arrays by name."""
    _, hidden, kernel = LAYOUTS[layout]
    positions, vocab = P(*hidden[:2]), kernel[1] if len(kernel) == 2 else None
    vocab_of_logits = tuple(a for a in (vocab if isinstance(vocab, tuple) else (vocab,)) if a not in (None, *hidden))
    logits = P(*[*positions, None, None][:2], vocab_of_logits or None)
    return {
        **{"hidden": hidden, "kernel": kernel, "labels": positions, "sample_weight": positions},
        **{"logits": logits, "probabilities": logits, "bias": P(vocab), "class_weight": P(vocab)},
        **{"indices": positions, "shares": positions},
        **{"hidden_p": hidden, "kernel_p": P(*kernel[::-1], *[None] * (2 - len(kernel))), "bias_p": P(vocab)},
        **{"logits_p": logits, "temperature": P(), "temperatures": P(positions[0] if positions else None)},
    }


def axes_of(name, layout, mode):
    """The options that name the mesh axes of a layout, if the mode is "Named"; these axes are of type `Auto`."""
    if mode != "Named":
        return {}
    specs = specs_of(layout)
    classes = {"axis_name": specs["logits"][2]}
    return classes if name in ("logsumexp", *SOFTMAXES) else classes | {"batch_axis_name": specs["labels"]}


def placed(name, layout, mode):
    """The cotangents and the arguments of the call, on a mesh with axes of this type."""
    mesh, specs = mesh_of("Auto" if mode == "Named" else mode, **LAYOUTS[layout][0]), specs_of(layout)
    return [put(mesh, COTANGENTS, specs["labels"]), *(put(mesh, ARRAYS[a], specs[a]) for a in CALLS[name][1])]


def run(name, layout, mode):
    """(The value and the gradients, the compiled program, the sharded arrays)."""
    f, wrt = value_and_grad(name, **axes_of(name, layout, mode))
    arrays = placed(name, layout, mode)
    # With "Named" the gradients are sharded like the parameters, as in a training step.
    shardings = {"out_shardings": (None, tuple(arrays[i].sharding for i in wrt))} if mode == "Named" else {}
    program = jax.jit(jax.value_and_grad(f, wrt), **shardings).lower(*arrays).compile()
    return program(*arrays), program, arrays


def assert_nothing_else_moves(text, layout):
    """Outside of the loop the program moves only what `MOVED` has."""
    found = numbers_alone_in_the_loop(text, layout)
    large = sorted((c.kind, c.size) for c in found if c.size >= KERNEL.size // 8 and c.kind != "all-reduce")
    assert large == MOVED.get(layout, [])


def numbers_alone_in_the_loop(text, layout):
    """All collectives. Those in the loop sum one number for each position of a block."""
    found = collectives(text)
    local_block = BLOCK // int(np.prod([LAYOUTS[layout][0].get(a, 1) for a in ("data", "sequence")]))
    assert " while(" in text  # otherwise there would be one block, of more positions
    assert all(c.kind == "all-reduce" and c.size <= local_block for c in found if c.in_loop), found
    return found
