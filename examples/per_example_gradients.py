"""Per-example losses and gradients with `jax.vmap`, clipped and noised as in DP-SGD.

The loss of one example is `jxent.cross_entropy` on unbatched logits; `vmap` of it, and of its
gradient, gives the losses and gradients of a batch. Differentially private SGD (Abadi et al. 2016)
clips each gradient to norm C, adds them up, adds Gaussian noise of standard deviation
`noise_multiplier * C`, and divides by the batch size.

This shows the mechanics ONLY. It does NO privacy accounting and states no (epsilon, delta): a
privacy claim needs an accountant, and batches drawn at random in the way the accountant assumes.

    pip install jxent optax scikit-learn
    python per_example_gradients.py
    python per_example_gradients.py --smoke    # two steps of training
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jxent

BATCH_SIZE = 256


def init_params(key, sizes=(64, 64, 10)):
    """Normal weights of variance 2 / fan_in and zero biases, layer by layer."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "kernel": jax.random.normal(key, (fan_in, fan_out)) * np.sqrt(2 / fan_in),
            "bias": jnp.zeros(fan_out),
        }
        for key, fan_in, fan_out in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply(params, images):
    """Images (..., 64) to logits (..., 10)."""
    hidden_layer, output_layer = params
    hidden = jax.nn.relu(images @ hidden_layer["kernel"] + hidden_layer["bias"])
    return hidden @ output_layer["kernel"] + output_layer["bias"]


def loss_fn(params, image, label):
    """The loss of ONE example: logits (10,) and a scalar label."""
    return jxent.cross_entropy(apply(params, image), label)


per_example_losses = jax.jit(jax.vmap(loss_fn, in_axes=(None, 0, 0)))
per_example_grads = jax.jit(jax.vmap(jax.grad(loss_fn), in_axes=(None, 0, 0)))


@jax.jit
def private_gradient(params, images, labels, key, clip_norm, noise_multiplier):
    """The gradient of DP-SGD, and how many of the per-example gradients were clipped."""
    grads = per_example_grads(params, images, labels)
    clipped_sum, num_clipped = optax.per_example_global_norm_clip(grads, clip_norm)
    noise = optax.tree.random_like(key, clipped_sum, sampler=jax.random.normal)

    def average(total, unit_noise):
        return (total + noise_multiplier * clip_norm * unit_noise) / len(labels)

    return jax.tree.map(average, clipped_sum, noise), num_clipped


@jax.jit
def per_example_norms(params, images, labels, clip_norm):
    """The norm of each example's gradient, before and after clipping."""

    def norms(grad):
        batch_of_one = jax.tree.map(lambda leaf: leaf[None], grad)
        clipped, _ = optax.per_example_global_norm_clip(batch_of_one, clip_norm)
        return optax.tree.norm(grad), optax.tree.norm(clipped)

    return jax.vmap(norms)(per_example_grads(params, images, labels))


def print_hardest(params, images, labels, clip_norm, count=5):
    """Prints the examples with the largest losses, and what clipping does to their gradients."""
    losses = np.asarray(per_example_losses(params, images, labels))
    hardest = np.argsort(-losses)[:count]
    norms = per_example_norms(params, images[hardest], labels[hardest], clip_norm)
    print("  example  label  loss (nats)  gradient norm  after clipping")
    for i, norm, clipped_norm in zip(hardest, *map(np.asarray, norms), strict=True):
        print(f"  {i:7d}  {labels[i]:5d}  {losses[i]:11.4f}  {norm:13.4f}  {clipped_norm:14.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--clip-norm", type=float, default=1.0, help="C")
    parser.add_argument("--noise-multiplier", type=float, default=1.0, help="noise deviation / C")
    parser.add_argument("--learning-rate", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two steps")
    args = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    params = init_params(jax.random.key(args.seed))

    print('reduction="none" on the batch gives the losses that vmap over one example gives:')
    batched = jxent.cross_entropy(apply(params, images), labels, reduction="none")
    difference = jnp.abs(batched - per_example_losses(params, images, labels)).max()
    print(f"  largest difference over {len(labels)} examples: {difference:.1e} nats\n")

    print("The hardest examples before training:")
    print_hardest(params, images, labels, args.clip_norm)

    print(f"\nTraining, C = {args.clip_norm}, noise multiplier = {args.noise_multiplier}:")
    optimizer = optax.sgd(args.learning_rate)
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(args.seed)
    key = jax.random.key(args.seed + 1)
    steps = 2 if args.smoke else args.steps
    print("  step  loss (nats)  clipped in the batch")
    for step in range(1, steps + 1):
        batch = rng.choice(len(labels), BATCH_SIZE, replace=False)
        gradient, num_clipped = private_gradient(
            params,
            images[batch],
            labels[batch],
            jax.random.fold_in(key, step),
            args.clip_norm,
            args.noise_multiplier,
        )
        updates, opt_state = optimizer.update(gradient, opt_state)
        params = optax.apply_updates(params, updates)
        if step == 1 or step % 10 == 0 or step == steps:
            loss = per_example_losses(params, images, labels).mean()
            print(f"  {step:4d}  {loss:11.4f}  {num_clipped:3d} of {BATCH_SIZE}")

    print("\nThe hardest examples after training:")
    print_hardest(params, images, labels, args.clip_norm)


if __name__ == "__main__":
    main()
