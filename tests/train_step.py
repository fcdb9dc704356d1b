"""A training step as users write it: a Flax NNX transformer in bfloat16, remat, AdamW, sharded by logical names.

Parameters are float32. Their axes have names, and `Rules` say which mesh axes shard a name, as in MaxText.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jxent


class Step(NamedTuple):
    """A model, and how it is trained."""

    vocab: int = 64
    features: int = 16
    layers: int = 2
    heads: int = 2
    batch: int = 8
    length: int = 8
    dtype: Any = jnp.bfloat16  # of the matmuls
    param_dtype: Any = jnp.float32
    tied: bool = True
    scan: bool = False  # over the layers, instead of a loop
    accumulate: int = 1  # how many parts of a batch are taken one after the other
    constrain: bool = True  # whether activations are constrained to be sharded as the batch
    named: bool = False  # whether the loss is told the mesh axes
    full_logits: bool = False


class Rules(NamedTuple):
    """The mesh axes of each logical name."""

    batch: Any = None
    length: Any = None
    vocab: Any = None
    embed: Any = None  # the features, of parameters
    mlp: Any = None

    def spec(self, *names):
        return P(*(None if name is None else getattr(self, name) for name in names))


NAMES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "qkv": ("embed", "mlp"),
    "out": ("mlp", "embed"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}


class Block(nnx.Module):
    def __init__(self, step, rngs):
        self.heads, f = step.heads, step.features
        linear = partial(nnx.Linear, use_bias=False, dtype=step.dtype, param_dtype=step.param_dtype, rngs=rngs)
        self.qkv, self.out, self.up, self.down = linear(f, 3 * f), linear(f, f), linear(f, 4 * f), linear(4 * f, f)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(normalized(x)).reshape(*x.shape[:-1], self.heads, -1), 3, -1)
        x = x + self.out(attention(q, k, v).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(normalized(x))))


class Transformer(nnx.Module):
    def __init__(self, step, rules, rngs):
        self.step, self.rules = step, rules
        options = {"dtype": step.dtype, "param_dtype": step.param_dtype, "rngs": rngs}
        self.embedding = nnx.Embed(step.vocab, step.features, **options)
        if not step.tied:
            self.head = nnx.Linear(step.features, step.vocab, use_bias=False, **options)
        if step.scan:
            self.blocks = nnx.vmap(partial(Block, step))(rngs.split(step.layers))
        else:
            self.blocks = nnx.List([Block(step, rngs) for _ in range(step.layers)])

    def __call__(self, tokens):
        @nnx.remat
        def through(block, x):
            return block(self.constrained(x))

        x = self.constrained(self.embedding(tokens))
        if self.step.scan:
            x = nnx.scan(through, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)
        else:
            for block in self.blocks:
                x = through(block, x)
        return normalized(x)

    def constrained(self, x):
        if not self.step.constrain or jax.sharding.get_abstract_mesh().empty:
            return x
        return jax.lax.with_sharding_constraint(x, self.rules.spec("batch", "length", None))


def attention(q, k, v):
    """Causal; JAX's own takes its softmax in float32, also of float64."""
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("...hqk,...khd->...qhd", jxent.softmax(scores, where=seen), v)


def normalized(x):
    square = jnp.mean(jnp.square(x), -1, keepdims=True, dtype=jnp.promote_types(x.dtype, jnp.float32))
    return (x * jax.lax.rsqrt(square + 1e-6)).astype(x.dtype)


def loss_of(model, tokens):
    step, rules = model.step, model.rules
    hidden, labels = hidden_of(model, tokens), jxent.next_token_labels(tokens)
    classes = None if rules.vocab == rules.batch else rules.vocab  # an axis that shards both shards the positions
    axes = {"axis_name": classes, "batch_axis_name": rules.spec("batch", "length")} if step.named else {}
    kernel, vocab_axis = (model.embedding.embedding, 0) if step.tied else (model.head.kernel, -1)
    kernel = kernel[...].astype(step.dtype)
    if step.full_logits:
        logits = hidden @ (kernel if vocab_axis else kernel.T)
        return jxent.cross_entropy(logits, labels, **axes)
    return jxent.linear_cross_entropy(hidden, kernel, labels, vocab_axis=vocab_axis, **axes)


def hidden_of(model, tokens):
    """On a mesh with `Explicit` axes the model leaves its shardings to the compiler, and the loss has them in types."""
    explicit = jax.typeof(tokens).sharding.mesh.explicit_axes
    if not explicit:
        return model(tokens)
    graph, params = nnx.split(model)

    def call(params, tokens):
        return nnx.merge(graph, params)(tokens)

    of_mesh = jax.sharding.auto_axes(call, axes=explicit, out_sharding=model.rules.spec("batch", "length", None))
    return of_mesh(params, tokens)


def update_of(step):
    """(the initial state, from a seed; the function of state and tokens that returns the next state and the loss)."""

    def initial(rules, seed):
        model = Transformer(step, rules, nnx.Rngs(seed))
        return nnx.split((model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)))

    def update(graph, state, tokens):
        model, optimizer = nnx.merge(graph, state)
        value_and_grad = nnx.value_and_grad(loss_of)
        if step.accumulate == 1:
            loss, grads = value_and_grad(model, tokens)
        else:
            graph_of_model, params = nnx.split(model)

            def add(carry, part):
                new = value_and_grad(nnx.merge(graph_of_model, params, copy=True), part)
                return jax.tree.map(lambda a, b: a + b / step.accumulate, carry, new), None

            zeros = jnp.zeros((), jnp.promote_types(step.dtype, jnp.float32)), jax.tree.map(jnp.zeros_like, params)
            (loss, grads), _ = jax.lax.scan(add, zeros, tokens)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    return initial, update


def shapes_of(step, rules, mesh):
    """(the graph, the state and the tokens as sharded shapes)."""
    graph, state = nnx.eval_shape(partial(update_of(step)[0], rules, 0))

    def sharded(path, leaf):
        path = jax.tree_util.keystr(path)
        names = next((names for name, names in NAMES.items() if name in path and leaf.ndim >= 2), ())
        spec = rules.spec(*(None,) * (leaf.ndim - len(names)), *names)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    state = jax.tree.map_with_path(sharded, state)
    shape, spec = (step.batch, step.length), rules.spec("batch", "length")
    if step.accumulate > 1:
        shape, spec = (step.accumulate, step.batch // step.accumulate, step.length), P(None, *spec)
    return graph, state, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))
