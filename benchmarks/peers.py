"""The losses that are compared: jxent and what else computes the same mean.

JAX losses are functions of (logits, labels) or of (hidden, kernel, labels), with a kernel of (features, vocab). PyTorch
losses take tensors, and a weight of (vocab, features). Index labels, mean reduction, no options. Full logits of
bfloat16 are read in float32, as training code does. A library that cannot be imported is left out, and says so once.
"""

import functools
import importlib
import os
import sys

import jax
import jax.numpy as jnp

import jxent

CHUNKS = (256, 1024, 4096)  # positions per chunk of PyTorch's linear_cross_entropy, besides its own choice
absent: dict[str, str] = {}  # library -> why it is left out


@functools.cache
def optional(module):
    """The module, or None if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a broken installation raises
        absent[module] = str(error)
        print(f"{module} is left out: {error}", file=sys.stderr)


def log_softmax_loss(logits, labels):
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], -1))


def logits_losses():
    """Name -> mean loss of (logits, labels)."""
    losses = {"jxent": jxent.cross_entropy}
    if optax := optional("optax"):
        losses["Optax"] = lambda logits, labels: jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        )
    losses["jax.nn"] = log_softmax_loss
    return losses


def linear_losses():
    """Name -> mean loss of (hidden, kernel, labels)."""
    losses = {"jxent": jxent.linear_cross_entropy}
    for name, loss in logits_losses().items():
        losses[f"{name}, full logits"] = lambda hidden, kernel, labels, loss=loss: loss(hidden @ kernel, labels)
    if jax_cce := optional("jax_cce"):
        losses["jax-cce"] = lambda hidden, kernel, labels: jax_cce.linear_cross_entropy(hidden, kernel.T, labels)
    if tokamax := optional("tokamax"):
        optional("absl.flags").FLAGS.mark_as_parsed()  # else it takes this program's arguments for its own
        for form in ("xla", "mosaic_tpu") if jax.default_backend() == "tpu" else ("xla",):
            losses[f"tokamax, {form}"] = lambda hidden, kernel, labels, form=form: (
                tokamax.linear_softmax_cross_entropy_loss(hidden, labels, kernel, reduction="mean", implementation=form)
            )
    return losses


def torch_here():
    """PyTorch, if it can use the device that JAX uses, with as many threads as there are cores; else None."""
    if jax.default_backend() not in ("cpu", "gpu") or not (torch := optional("torch")):
        return None
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        if "torch" not in absent:
            absent["torch"] = "it has no GPU"
            print("torch is left out: it has no GPU", file=sys.stderr)
        return None
    torch.set_num_threads(cores())
    return torch


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def torch_logits_losses():
    """Name -> mean loss of the tensors (logits, labels)."""
    if not (torch := torch_here()):
        return {}
    loss = torch.nn.functional.cross_entropy
    return {
        "PyTorch": loss,
        "PyTorch, compiled": torch.compile(lambda logits, labels: loss(logits, labels), dynamic=False),
    }


def torch_linear_losses():
    """Name -> mean loss of the tensors (hidden, weight, labels)."""
    if not (torch := torch_here()):
        return {}
    f = torch.nn.functional

    def full(hidden, weight, labels):
        return f.cross_entropy(f.linear(hidden, weight), labels)

    return {"PyTorch, full logits": full, "PyTorch, full logits, compiled": torch.compile(full, dynamic=False)}


def torch_chunked_losses(positions):
    """Setting -> PyTorch's linear_cross_entropy with that setting, a mean loss of (hidden, weight, labels)."""
    torch = torch_here()
    if not torch or not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return {}
    loss, options = torch.nn.functional.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions
    settings = {"no chunks": None, "auto": options()}
    for size in CHUNKS:
        if size < positions:
            settings[f"chunks of {size}"] = options(batch_chunk_size=size, chunking_method=None)
    return {name: functools.partial(loss, options=setting) for name, setting in settings.items()}
