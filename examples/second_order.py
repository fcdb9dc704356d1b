"""Second-order training of a softmax classifier, with other people's optimizers: they differentiate jxent forwards.

Multinomial logistic regression on scikit-learn's handwritten digits, with weight decay, so that there is one minimum.
Four ways to it:

- `optimistix.BFGS` and `optax.lbfgs`, whose line searches take the loss along a direction;
- `optimistix.LevenbergMarquardt` on the square roots of the losses, whose Jacobian it takes forwards;
- Newton's method with Hessian-vector products, `jax.jvp` of `jax.grad`, in conjugate gradients: no Hessian is held.

    pip install jxent optax optimistix scikit-learn
    python second_order.py            # a minute
    python second_order.py --smoke    # fewer digits
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
from sklearn.datasets import load_digits

import jxent

DECAY = 1e-3


def digits(number):
    """Images (number, 65) with a constant 1 as last pixel, and labels (number,)."""
    images, labels = load_digits(return_X_y=True)
    images = np.concatenate([images / 16, np.ones((len(images), 1))], 1)
    return jnp.asarray(images[:number], jnp.float32), jnp.asarray(labels[:number], jnp.int32)


def penalty(kernel):
    return DECAY / 2 * jnp.vdot(kernel, kernel)


def objective(kernel, data):
    """The mean loss of a kernel (65, 10), with weight decay."""
    images, labels = data
    return jxent.cross_entropy(images @ kernel, labels) + penalty(kernel)


def residuals(kernel, data):
    """Numbers whose squares add up to twice the objective."""
    images, labels = data
    losses = jxent.cross_entropy(images @ kernel, labels, reduction="none")
    return jnp.concatenate([jnp.sqrt(2 * losses / len(labels)), jnp.sqrt(DECAY) * kernel.ravel()])


def by_bfgs(kernel, data):
    solver = optimistix.BFGS(rtol=1e-6, atol=1e-6)
    return optimistix.minimise(objective, solver, kernel, data, max_steps=1000, throw=False).value


def by_levenberg_marquardt(kernel, data):
    solver = optimistix.LevenbergMarquardt(rtol=1e-5, atol=1e-5)
    return optimistix.least_squares(residuals, solver, kernel, data, max_steps=200, throw=False).value


def by_lbfgs(kernel, data, steps=100):
    optimizer = optax.lbfgs()
    loss = jax.tree_util.Partial(objective, data=data)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(_, carry):
        kernel, state = carry
        value, grad = value_and_grad(kernel, state=state)
        updates, state = optimizer.update(grad, state, kernel, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(kernel, updates), state

    return jax.lax.fori_loop(0, steps, step, (kernel, optimizer.init(kernel)))[0]


def by_newton(kernel, data, steps=8):
    gradient = jax.grad(objective)

    def step(_, kernel):
        def hessian_times(v):
            return jax.jvp(lambda kernel: gradient(kernel, data), (kernel,), (v,))[1]

        direction, _ = jax.scipy.sparse.linalg.cg(hessian_times, gradient(kernel, data), maxiter=200)
        return kernel - direction

    return jax.lax.fori_loop(0, steps, step, kernel)


WAYS = {
    "Newton, conjugate gradients": by_newton,
    "optax.lbfgs": by_lbfgs,
    "optimistix.BFGS": by_bfgs,
    "optimistix.LevenbergMarquardt": by_levenberg_marquardt,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="200 digits")
    data = digits(200 if parser.parse_args().smoke else 1797)
    start = jnp.zeros((data[0].shape[1], 10))
    print(f"{len(data[1])} digits, {start.size} parameters; loss at the start {objective(start, data):.6f}")
    print(f"{'way':30} {'loss':>9} {'gradient':>9}")
    found = {}
    for name, minimize in WAYS.items():
        kernel = jax.jit(minimize)(start, data)
        found[name] = float(objective(kernel, data))
        size = jnp.max(jnp.abs(jax.grad(objective)(kernel, data)))
        print(f"{name:30} {found[name]:9.6f} {size:9.1e}")
    assert max(found.values()) < min(found.values()) + 1e-4, "they should find one minimum"


if __name__ == "__main__":
    main()
