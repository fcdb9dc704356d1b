"""Calls of every function, with types and shapes of the package's own functions checked at run time.

    pip install -e ".[lint]" && python tests/checked_shapes.py

jaxtyping checks the arguments and results of each function of these folders while JAX traces it. The folders whose
records stand for other things than arrays too (gradients, types, dimensions) are left to the type checker.
"""

from jaxtyping import install_import_hook

FOLDERS = [f"jxent.{folder}" for folder in ("_core", "_backend", "_rows", "_sweep")]


def main():
    with install_import_hook(FOLDERS, "typeguard.typechecked"):
        import jxent
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 3, 40)).astype(np.float32), rng.integers(0, 40, (2, 3))
    q = np.asarray(jax.nn.softmax(rng.normal(size=(2, 3, 40)))).astype(np.float32)
    hidden, kernel = rng.normal(size=(2, 3, 8)).astype(np.float32), rng.normal(size=(8, 40)).astype(np.float32)
    sparse = jxent.SparseLabels(rng.integers(0, 40, (2, 3, 4)), np.full((2, 3, 4), 0.25, np.float32))
    weights = {
        "class_weight": np.ones(40, np.float32),
        "sample_weight": np.ones((2, 3), np.float32),
        "where": np.array([[True, True, False], [True, False, True]]),
    }
    costs = {"label_smoothing": 0.1, "z_loss_weight": 0.01, "logit_softcap": 30.0, "return_stats": True}
    costs["temperature"] = np.array([[0.5], [2.0]])
    of_positions = {"sample_weight": weights["sample_weight"], "where": weights["where"]}
    calls = []
    for of_kind in (labels, q, sparse):
        calls += [
            (lambda x, t=of_kind: jxent.cross_entropy(x, t), (logits,)),
            (lambda x, t=of_kind: jxent.cross_entropy(x, t, **weights, **costs), (logits,)),
            (lambda x, t=of_kind: jxent.nll_loss(jxent.log_softmax(x), t, **weights), (logits,)),
            (lambda h, w, t=of_kind: jxent.linear_cross_entropy(h, w, t, block_size=2), (hidden, kernel)),
            (
                lambda h, w, t=of_kind: jxent.linear_sigmoid_cross_entropy(
                    h, w, t, pos_weight=2.0, label_smoothing=0.1, block_size=2
                ),
                (hidden, kernel),
            ),
            (
                lambda h, w, t=of_kind: jxent.linear_cross_entropy(
                    h, w, t, **weights, **costs, reduction="none", block_size=2
                ),
                (hidden, kernel),
            ),
        ]
    for divergence in ("kl_divergence", "js_divergence", "tv_distance"):
        of_logits, linear = getattr(jxent, divergence), getattr(jxent, f"linear_{divergence}")
        calls += [
            (lambda p, q, f=of_logits: f(p, q, temperature=[[0.5], [2.0]], **of_positions), (logits, logits[::-1])),
            (lambda h, w, f=linear: f(h, w, h[::-1], w, block_size=2, **of_positions), (hidden, kernel)),
        ]
    calls += [
        (lambda x: jxent.sigmoid_cross_entropy(x, q, pos_weight=2.0, label_smoothing=0.1), (logits,)),
        (lambda x: jxent.softmax(x) ** 2, (logits,)),
        (lambda x: jxent.logsumexp(x, (0, 2)), (logits,)),
    ]

    def total(function):
        return lambda *args: sum(
            jnp.sum(leaf) for leaf in jax.tree.leaves(function(*args)) if jnp.issubdtype(leaf.dtype, jnp.floating)
        )

    for function, args in calls:
        f, every = total(function), tuple(range(len(args)))
        jax.jit(jax.value_and_grad(f, every)).lower(*args)
        jax.jit(lambda *args, f=f: jax.jvp(f, args, args)).lower(*args)
        jax.jit(lambda *args, f=f, every=every: jax.jvp(jax.grad(f, every), args, args)).lower(*args)
    print(len(calls), "calls")


if __name__ == "__main__":
    main()
