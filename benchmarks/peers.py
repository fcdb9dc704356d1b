"""The losses that are compared: jxent and what else computes the same mean.

JAX losses are functions of (logits, labels) or of (hidden, kernel, labels), with a kernel of (features, vocab). PyTorch
losses take tensors, and a weight of (vocab, features). Index labels, mean reduction, no options. Full logits of
bfloat16 are read in float32, as training code does. A library that cannot be imported is left out, and says so once.
"""

import functools
import importlib
import sys

import jax
import jax.numpy as jnp
from report import cores

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


def log_softmax(logits):
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


def log_softmax_loss(logits, labels):
    return -jnp.mean(jnp.take_along_axis(log_softmax(logits), labels[:, None], -1))


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
        # pip installs 0.0.12 on Python 3.11, which lacks `chunked_xla`, and 0.0.17 on 3.13, where it pads the
        # classes with zeros, which it counts as classes, unless 2048 divides their number.
        for form in ("xla", "chunked_xla", *(["mosaic_tpu"] if jax.default_backend() == "tpu" else [])):
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


def torch_logits_losses():
    """Name -> mean loss of the tensors (logits, labels)."""
    if not (torch := torch_here()):
        return {}
    loss = torch.nn.functional.cross_entropy
    return {
        "PyTorch": loss,
        "PyTorch, compiled": torch.compile(lambda logits, labels: loss(logits, labels), dynamic=False),
    }


def torch_linear_losses(positions):
    """Name -> mean loss of the tensors (hidden, weight, labels)."""
    if not (torch := torch_here()):
        return {}
    f = torch.nn.functional

    def full(hidden, weight, labels):
        return f.cross_entropy(f.linear(hidden, weight), labels)

    losses = {
        "PyTorch, full logits": full,
        "PyTorch, full logits, compiled": torch.compile(full, dynamic=False),
    }
    if hasattr(f, "linear_cross_entropy"):
        chunked, options = f.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions
        losses["PyTorch, linear_cross_entropy"] = functools.partial(chunked, options=options())
        for size in CHUNKS:
            if size < positions:
                fixed = options(batch_chunk_size=size, chunking_method=None)
                losses[f"PyTorch, chunks of {size}"] = functools.partial(chunked, options=fixed)
    return losses


def torch_sets(sets):
    """The same arrays as tensors, the kernel as PyTorch lays it out; shared with JAX where the layout is the same."""
    torch = torch_here()

    def tensor(array):
        shared = torch.from_dlpack(array)
        return shared.detach().requires_grad_() if jnp.issubdtype(array.dtype, jnp.floating) else shared.long()

    def weight(kernel):
        return torch.from_dlpack(kernel).T.contiguous().requires_grad_()

    return [(tensor(s[0]), *(weight(k) for k in s[1:-1]), tensor(s[-1])) for s in sets]


def torch_call(loss, grad):
    """A function of a tuple of tensors that computes the loss, and gradients, and waits for them."""
    torch = torch_here()

    def run(tensors):
        if grad:
            value = loss(*tensors)
            out = value.detach(), torch.autograd.grad(value, tensors[:-1])
        else:
            with torch.no_grad():
                out = loss(*tensors)
        if tensors[0].is_cuda:
            torch.cuda.synchronize()
        return out

    return run
