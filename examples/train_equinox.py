"""Train an Equinox MLP on handwritten digits with `jxent.cross_entropy` and Optax.

The shortest complete training script: scikit-learn's bundled digits, `eqx.nn.MLP`, one jitted step.
Each epoch prints the label-smoothed loss and the accuracy of its last batch.

    pip install jxent equinox optax scikit-learn
    python train_equinox.py
    python train_equinox.py --smoke    # two epochs
"""

import argparse

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jxent

BATCH_SIZE = 64


def loss_fn(model, images, labels, smoothing=0.0):
    logits = jax.vmap(model)(images)
    loss, stats = jxent.cross_entropy(logits, labels, label_smoothing=smoothing, return_stats=True)
    return loss, stats.correct.mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two epochs")
    args = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=args.seed
    )

    model = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=jax.random.key(args.seed))
    optimizer = optax.adamw(2e-3)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def train_step(model, opt_state, images, labels):
        value_and_grad = eqx.filter_value_and_grad(loss_fn, has_aux=True)
        (loss, accuracy), grads = value_and_grad(model, images, labels, smoothing=0.1)
        updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), opt_state, loss, accuracy

    rng = np.random.default_rng(args.seed)
    for epoch in range(2 if args.smoke else args.epochs):
        order = rng.permutation(len(train_labels))
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            images, labels = train_images[batch], train_labels[batch]
            model, opt_state, loss, accuracy = train_step(model, opt_state, images, labels)
        print(f"epoch {epoch + 1:2d}  smoothed loss {loss:.4f} nats, accuracy {accuracy:.1%}")

    loss, accuracy = eqx.filter_jit(loss_fn)(model, test_images, test_labels)
    print(f"held-out: loss {loss:.4f} nats, accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
