"""Train a small Flax NNX network on handwritten digits with `jxent.cross_entropy` and Optax.

The data are the 1797 real 8 x 8 scans that scikit-learn bundles, so nothing is downloaded. One
call gives the training step its label-smoothed loss and, from the same pass, the predictions and
the log-probabilities behind the progress bar and the curves. A full run takes seconds on a laptop
and writes the curves to `train_digits.png`.

    pip install jxent flax optax scikit-learn matplotlib tqdm
    python train_digits.py            # the full run, at least 97% of the held-out digits right
    python train_digits.py --smoke    # two epochs, to see that everything works
"""

import argparse
import sys
import time

import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jxent

BATCH_SIZE = 64
SMOOTHING = 0.1
REQUIRED_ACCURACY = 0.97


class CNN(nnx.Module):
    """Two convolutions and a linear layer: images (batch, 8, 8, 1) to logits (batch, 10)."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, kernel_size=(3, 3), rngs=rngs)
        self.linear = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.conv1(images))
        x = nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nnx.relu(self.conv2(x))
        return self.linear(x.reshape(x.shape[0], -1))


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_fn(model):
        logits = model(images)
        return jxent.cross_entropy(logits, labels, label_smoothing=SMOOTHING, return_stats=True)

    (loss, stats), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return {
        "smoothed_loss": loss,
        "loss": -stats.log_prob.mean(),  # without the smoothing, to compare with the held-out loss
        "accuracy": stats.correct.mean(),
    }


@nnx.jit
def eval_step(model, images, labels):
    loss, stats = jxent.cross_entropy(model(images), labels, return_stats=True)
    return loss, stats.correct.mean()


def load_data(seed):
    """Returns images and labels, 80% for training and 20% held out, with all digits in both."""
    digits = load_digits()
    images = digits.images[..., None].astype(np.float32) / 16
    labels = digits.target.astype(np.int32)
    return train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)


def train(model, data, epochs, seed):
    """Trains `model` in place and returns the metrics of each epoch."""
    train_images, test_images, train_labels, test_labels = data
    steps_per_epoch = len(train_labels) // BATCH_SIZE
    steps = epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0, peak_value=5e-3, warmup_steps=steps // 10, decay_steps=steps
    )
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=1e-2), wrt=nnx.Param)

    rng = np.random.default_rng(seed)
    history = []
    progress = tqdm(range(epochs), desc="training", unit="epoch")
    for _ in progress:
        order = rng.permutation(len(train_labels))[: steps_per_epoch * BATCH_SIZE]
        batches = [
            train_step(model, optimizer, train_images[batch], train_labels[batch])
            for batch in order.reshape(steps_per_epoch, BATCH_SIZE)
        ]
        metrics = {name: np.mean([batch[name] for batch in batches]) for name in batches[0]}
        test_loss, test_accuracy = eval_step(model, test_images, test_labels)
        metrics["test_loss"], metrics["test_accuracy"] = float(test_loss), float(test_accuracy)
        history.append(metrics)
        progress.set_postfix_str(
            f"loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.1%}, "
            f"held-out {metrics['test_loss']:.3f}, {metrics['test_accuracy']:.1%}"
        )
    return history


def plot(history, path):
    """Writes the loss and accuracy curves of `history` to an image file."""
    epochs = np.arange(1, len(history) + 1)
    curves = {name: [metrics[name] for metrics in history] for name in history[0]}
    final = history[-1]

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle("Handwritten digits: a small CNN trained with jxent.cross_entropy")
    loss_axes, accuracy_axes = figure.subplots(1, 2)

    smoothed_label = f"training, with label smoothing {SMOOTHING} (minimized)"
    loss_axes.plot(epochs, curves["smoothed_loss"], "--", color="tab:blue", label=smoothed_label)
    loss_axes.plot(epochs, curves["loss"], color="tab:blue", label="training")
    loss_axes.plot(epochs, curves["test_loss"], color="tab:orange", label="held-out")
    loss_axes.set(title="Loss", xlabel="epoch", ylabel="cross-entropy (nats)", ylim=(0, None))

    train_label = f"training, {final['accuracy']:.1%} at the end"
    test_label = f"held-out, {final['test_accuracy']:.1%} at the end"
    accuracy_axes.plot(epochs, curves["accuracy"], color="tab:blue", label=train_label)
    accuracy_axes.plot(epochs, curves["test_accuracy"], color="tab:orange", label=test_label)
    accuracy_axes.set(title="Accuracy", xlabel="epoch", ylabel="digits classified correctly")
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))

    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the model, the batches")
    parser.add_argument("--out", default="train_digits.png", help="the image with the curves")
    parser.add_argument("--smoke", action="store_true", help="two epochs, no required accuracy")
    args = parser.parse_args()

    data = load_data(args.seed)
    model = CNN(nnx.Rngs(args.seed))
    start = time.perf_counter()
    history = train(model, data, 2 if args.smoke else args.epochs, args.seed)
    seconds = time.perf_counter() - start
    plot(history, args.out)

    loss, accuracy = history[-1]["test_loss"], history[-1]["test_accuracy"]
    print(f"held-out loss      {loss:.4f} nats, without label smoothing")
    print(f"held-out accuracy  {accuracy:.2%}")
    print(f"training took      {seconds:.1f} s, compilation included")
    print(f"curves             {args.out}")
    if not args.smoke and accuracy < REQUIRED_ACCURACY:
        sys.exit(f"failed: held-out accuracy {accuracy:.2%} is below {REQUIRED_ACCURACY:.0%}")


if __name__ == "__main__":
    main()
