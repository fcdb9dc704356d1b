"""Train an image and a text encoder on handwritten numbers and their names, by the losses of SigLIP and of CLIP.

An image is three of the real 8 x 8 scans of digits that scikit-learn bundles, side by side, and its text is their
names: "seven two one". So there are 1000 texts, and nothing is downloaded. `jxent.linear_sigmoid_cross_entropy` is the
loss of SigLIP and `jxent.linear_cross_entropy` that of CLIP, from the embeddings alone: the similarities of all pairs
are never stored. The same step then trains on a mesh of eight devices, simulated on the CPU, with the same losses. At
the end, each image of held-out scans looks for its text among all 1000.

    pip install jxent flax optax scikit-learn matplotlib tqdm
    python contrastive.py            # the full run, at least 80% of the held-out images find their text
    python contrastive.py --smoke    # a few steps, to see that everything works
"""

import argparse
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jxent

DEVICES = 8
DIGITS, NUMBERS = 3, 1000
BATCH, FEATURES = 256, 64
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
REQUIRED_ACCURACY = 0.8
PAIRS_OF_MEMORY = 8192


class Encoders(nnx.Module):
    """Images (batch, 8, 24) and texts (batch, 3), as word numbers, to vectors of length 1; and two learned numbers."""

    def __init__(self, rngs):
        self.of_scan = nnx.Sequential(nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 64, rngs=rngs))
        self.of_word = nnx.Embed(len(WORDS), 64, rngs=rngs)
        self.image, self.text = (
            nnx.Sequential(nnx.Linear(64 * DIGITS, 256, rngs=rngs), nnx.relu, nnx.Linear(256, FEATURES, rngs=rngs))
            for _ in range(2)
        )
        self.log_scale, self.bias = nnx.Param(jnp.float32(np.log(10))), nnx.Param(jnp.float32(-10))

    def images(self, images):
        scans = images.reshape(-1, 8, DIGITS, 8).swapaxes(1, 2).reshape(-1, DIGITS, 64)
        return normalized(self.image(self.of_scan(scans).reshape(len(images), -1)))

    def texts(self, words):
        return normalized(self.text(self.of_word(words).reshape(len(words), -1)))


def normalized(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# --- the losses -------------------------------------------------------------------------------------------------------


def siglip(image, text, scale, bias):
    """Each pair of an image and a text is a yes or no of its own; the yes is on the diagonal."""
    n = len(image)
    options = {"vocab_axis": 0, "bias": jnp.full(n, bias)}
    return jxent.linear_sigmoid_cross_entropy(scale * image, text, jnp.arange(n), **options)


def clip(image, text, scale, bias):
    """Each image chooses among the texts, and each text among the images."""
    del bias
    right = jnp.arange(len(image))
    of_images = jxent.linear_cross_entropy(scale * image, text, right, vocab_axis=0)
    return (of_images + jxent.linear_cross_entropy(scale * text, image, right, vocab_axis=0)) / 2


def siglip_of_all_pairs(image, text, scale, bias):
    """The usual way, which stores the similarities of all pairs: compiled for its memory figure, never run."""
    signs = 2 * jnp.eye(len(image)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * (scale * image @ text.T + bias))) / len(image)


LOSSES = {"SigLIP": siglip, "CLIP": clip}


@partial(nnx.jit, static_argnums=0)
def train_step(loss, model, optimizer, images, words):
    def of_model(model):
        scale, bias = jnp.exp(model.log_scale[...]), model.bias[...]
        return loss(model.images(images), model.texts(words), scale, bias)

    value, grads = nnx.value_and_grad(of_model)(model)
    optimizer.update(model, grads)
    return value


# --- the data ---------------------------------------------------------------------------------------------------------


def load_scans(seed):
    """Scans of 16 gray levels and their digits, of training and held out."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    split = train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=seed)
    return (split[0], split[2]), (split[1], split[3])


def words_of(numbers):
    return np.stack([numbers // 100, numbers // 10 % 10, numbers % 10], -1)


def images_of(scans, numbers, rng):
    """An image of each number, of scans that are drawn anew."""
    images, digits = scans
    of_digit = [images[digits == digit] for digit in range(10)]
    words = words_of(numbers)
    drawn = [[of_digit[d][rng.integers(len(of_digit[d]))] for d in row] for row in words]
    return np.stack([np.concatenate(row, -1) for row in drawn]), words


# --- training ---------------------------------------------------------------------------------------------------------


def train(name, mesh, scans, steps, taken, seed):
    """The model after the first steps that are `taken`, and the loss of each; the mesh shards the batch."""
    rng = np.random.default_rng(seed)
    everywhere, over_batch = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    model = Encoders(nnx.Rngs(seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=steps // 10, decay_steps=steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
    for part in (model, optimizer):
        nnx.update(part, jax.device_put(nnx.state(part), everywhere))
    losses = []
    with tqdm(range(taken), desc=f"{name}, {mesh.size} device{'s'[: mesh.size > 1]}", unit=" steps") as progress:
        for _ in progress:
            batch = images_of(scans, rng.choice(NUMBERS, BATCH, replace=False), rng)
            losses.append(float(train_step(LOSSES[name], model, optimizer, *jax.device_put(batch, over_batch))))
            progress.set_postfix_str(f"loss {losses[-1]:.3f}")
    return model, np.array(losses)


def accuracy(model, scans, seed):
    """How many images of held-out scans, one of each number, find their text among all."""
    images, words = images_of(scans, np.arange(NUMBERS), np.random.default_rng(seed))
    similarities = model.images(images) @ model.texts(words).T
    return float(jnp.mean(jnp.argmax(similarities, -1) == jnp.arange(NUMBERS)))


def temporaries(loss):
    """MiB of temporaries of a loss of many pairs, with its gradients."""
    shapes = [(PAIRS_OF_MEMORY, FEATURES)] * 2 + [()] * 2
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def plot(curves, found, path):
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(f"Handwritten numbers and their names: {DIGITS} digits, {BATCH} pairs in a batch")
    for axes, name in zip(figure.subplots(1, 2), LOSSES, strict=True):
        alone, sharded = curves[name]
        axes.plot(alone, color="tab:blue", lw=3, alpha=0.4, label="one device")
        axes.plot(sharded, color="tab:orange", lw=1, label=f"a mesh of {DEVICES}")
        title = f"{name}: {found[name]:.0%} of held-out images find their text among {NUMBERS:,}"
        axes.set(title=title, xlabel="step", ylabel="loss (nats per image)", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the models, the batches")
    parser.add_argument("--out", default="contrastive.png", help="the image with the curves")
    parser.add_argument("--smoke", action="store_true", help="a few steps, no required accuracy")
    args = parser.parse_args()

    jax.config.update("jax_num_cpu_devices", DEVICES)
    steps = 10 if args.smoke else args.steps
    every = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    training, held_out = load_scans(args.seed)
    curves, found = {}, {}
    for name in LOSSES:
        model, alone = train(name, one, training, steps, steps, args.seed)
        found[name] = accuracy(model, held_out, args.seed)
        # Rounding differs on the mesh, and training magnifies it. So only the first steps must agree.
        _, sharded = train(name, every, training, steps, min(steps, 300), args.seed)
        curves[name] = alone, sharded
        np.testing.assert_allclose(sharded[:5], alone[:5], rtol=1e-3)
    plot(curves, found, args.out)
    for name in LOSSES:
        print(f"{name:<8}   loss {curves[name][0][-1]:.4f}, {found[name]:.1%} of the held-out images find their text")
    print(f"curves     {args.out}")
    ours, full = map(temporaries, (siglip, siglip_of_all_pairs))
    print(f"memory     SigLIP of {PAIRS_OF_MEMORY:,} pairs takes {ours:.0f} MiB, and {full:.0f} with all similarities")
    if not args.smoke and min(found.values()) < REQUIRED_ACCURACY:
        sys.exit(f"failed: an accuracy is below {REQUIRED_ACCURACY:.0%}")


if __name__ == "__main__":
    main()
