"""Relative error of the loss and of the label's gradient in float32: jxent beside Optax, jax.nn and PyTorch.

Every row has 1000 classes; the label's logit lies `margin` above the largest of the others, and `offset` is added to
all. The truth is float64 NumPy on the same float32 logits. Prints Markdown tables. PyTorch is optional.

    pip install -e ".[bench]" && python benchmarks/exactness.py
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jxent

MARGINS = (1.0, 5.0, 10.0, 17.0, 20.0, 40.0)
CLASSES = 1000
ROWS = 64


def truth(logits):
    """Loss and label gradient in float64; the label is class 0, which is the largest."""
    x = logits.astype(np.float64)
    loss = np.log1p(np.exp(x[:, 1:] - x[:, :1]).sum(-1))
    return loss, np.expm1(-loss)


def jax_peer(losses):
    def run(logits):
        value, pull = jax.vjp(lambda x: losses(x, jnp.zeros(len(x), jnp.int32)), jnp.asarray(logits))
        return value, pull(jnp.ones_like(value))[0][:, 0]

    return run


def torch_peer(logits):
    import torch

    x = torch.tensor(logits, requires_grad=True)
    value = torch.nn.functional.cross_entropy(x, torch.zeros(len(x), dtype=torch.long), reduction="none")
    value.sum().backward()
    return value.detach().numpy(), x.grad.numpy()[:, 0]


PEERS = {
    "jxent": jax_peer(lambda x, t: jxent.cross_entropy(x, t, reduction="none")),
    "Optax": jax_peer(optax.softmax_cross_entropy_with_integer_labels),
    "`jax.nn.log_softmax`": jax_peer(lambda x, t: -jax.nn.log_softmax(x)[jnp.arange(len(x)), t]),
}
if importlib.util.find_spec("torch"):
    PEERS["PyTorch"] = torch_peer


def shown(got, want):
    got = np.asarray(got, np.float64)
    error = np.max(np.abs(got - want) / np.abs(want))
    return f"{error:.0e}" if error < 1e-3 else f"{error:.1%}" if np.any(got != 0) else "100%: it is 0"


def main():
    rng = np.random.default_rng(0)
    for offset in (0.0, 1e4):
        for quantity in (0, 1):
            print(f"\nWorst relative error of the {('loss', 'gradient at the label')[quantity]}, offset {offset:g}\n")
            print("| margin | " + " | ".join(PEERS) + " |")
            print("|---:|" + "---:|" * len(PEERS))
            for margin in MARGINS:
                logits = rng.normal(size=(ROWS, CLASSES))
                logits[:, 0] = logits[:, 1:].max(-1) + margin
                logits = (logits + offset).astype(np.float32)
                want = truth(logits)[quantity]
                cells = [shown(peer(logits)[quantity], want) for peer in PEERS.values()]
                print(f"| {margin:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
