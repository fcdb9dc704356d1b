"""Train a small language model with tied embeddings, Flax NNX, Optax and `jxent.linear_cross_entropy`.

The text is on every machine: the source code of Python's own standard library, cut into 16384 byte-level BPE tokens
that the script learns first. The loss goes straight from the hidden states and the embedding to a number, so the
(tokens, vocab) logits are never held; the last line says what that saves. A full run takes about four minutes on two
CPU cores. Interrupt it when you like: the same command goes on exactly where it stopped.

    pip install jxent flax optax orbax-checkpoint tokenizers matplotlib tqdm
    python train_lm.py            # the full run; everything it writes goes to train_lm/
    python train_lm.py --smoke    # seconds, to see that everything works
"""

import argparse
import dataclasses
import math
import shutil
import signal
import statistics
import sys
import sysconfig
import threading
import time
import timeit
import zlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import jxent

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
END_OF_FILE = "<|endoffile|>"
PROMPT = "def read_lines(path):"
BLOCK_SIZE = 128  # positions whose logits are held at once
INIT = nnx.initializers.normal(0.02)  # so small that the first logits are near 0, and the first loss near log(vocab)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that shapes a run. A checkpoint is only continued with the settings that it began with."""

    vocab: int = 16384
    features: int = 128
    layers: int = 4
    heads: int = 4
    length: int = 128
    batch: int = 4
    steps: int = 1000
    learning_rate: float = 4e-3
    files: int | None = None  # of the standard library; None for all
    heldout_windows: int = 128
    eval_every: int = 100
    save_every: int = 200
    seed: int = 0


SMOKE = Settings(vocab=512, features=32, layers=1, steps=20, files=60, heldout_windows=8, eval_every=5, save_every=5)


def prepare_data(settings, out):
    """Returns the tokenizer, the training tokens, the held-out tokens, and the held-out bytes per token."""
    tokenizer_path, tokens_path = out / f"tokenizer_{settings.vocab}.json", out / f"tokens_{settings.vocab}.npz"
    if not tokens_path.exists():
        start = time.perf_counter()
        training, heldout = read_sources(settings.files)
        tokenizer = train_tokenizer(training, settings.vocab)
        tokenizer.save(str(tokenizer_path))
        arrays = {"training": encode(tokenizer, training), "heldout": encode(tokenizer, heldout)}
        size = sum(len(text.encode()) for text in heldout)
        partial_path = out / "partial.npz"  # renamed once complete, so that an interrupted write is not taken for data
        np.savez(partial_path, **arrays, heldout_bytes=size)
        partial_path.replace(tokens_path)
        files, seconds = len(training) + len(heldout), time.perf_counter() - start
        print(f"tokenizer trained on {files} files of the standard library in {seconds:.0f} s")
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    with np.load(tokens_path) as file:
        training, heldout, heldout_bytes = file["training"], file["heldout"], int(file["heldout_bytes"])
    print(f"tokens: {len(training):,} for training, {len(heldout):,} held out (whole files)")
    return tokenizer, training, heldout, heldout_bytes / len(heldout)


def read_sources(limit):
    """Returns the training and the held-out texts: 1 file in 10 is held out, chosen by a hash of its name."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if SKIPPED_FOLDERS.isdisjoint(name.split("/"))][:limit]
    training, heldout = [], []
    for name in names:
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        (heldout if zlib.crc32(name.encode()) % 10 == 0 else training).append(text)
    return training, heldout


def train_tokenizer(texts, vocab):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, texts):
    end = [tokenizer.token_to_id(END_OF_FILE)]
    return np.concatenate([encoding.ids + end for encoding in tokenizer.encode_batch(texts)]).astype(np.int32)


def training_batch(settings, tokens, step):
    """Random windows that depend on the seed and the step alone, so that a resumed run sees the same ones."""
    rng = np.random.default_rng((settings.seed, step))
    starts = rng.integers(0, len(tokens) - settings.length, size=(settings.batch, 1))
    return tokens[starts + np.arange(settings.length)]


def heldout_batches(settings, tokens):
    """The same evenly spaced windows each time, in batches."""
    starts = np.linspace(0, len(tokens) - settings.length, settings.heldout_windows).astype(int)
    return tokens[starts[:, None] + np.arange(settings.length)].reshape(-1, settings.batch, settings.length)


def rotate(x, start=0):
    """Rotary position embedding of x (batch, length, heads, features): attention then sees distances."""
    length, half = x.shape[1], x.shape[-1] // 2
    angles = (start + jnp.arange(length))[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nnx.Module):
    """Causal attention and a two-layer network, each normalized before and added to its input."""

    def __init__(self, features, heads, rngs):
        linear = partial(nnx.Linear, use_bias=False, kernel_init=INIT, rngs=rngs)
        self.heads = heads
        self.norm1 = nnx.RMSNorm(features, rngs=rngs)
        self.qkv = linear(features, 3 * features)
        self.out = linear(features, features)
        self.norm2 = nnx.RMSNorm(features, rngs=rngs)
        self.up = linear(features, 4 * features)
        self.down = linear(4 * features, features)

    def __call__(self, x, past=None, start=0):
        """Of x (batch, length, features) alone, or from `start` on of what has its keys and values in `past`."""
        batch, length, features = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, features // self.heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        query, key = rotate(query, start), rotate(key, start)
        if past is None:
            attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        else:
            for name, new in (("key", key), ("value", value)):
                past[name] = jax.lax.dynamic_update_slice_in_dim(past[name], new, start, axis=1)
            causal = jnp.arange(past["key"].shape[1]) <= start + jnp.arange(length)[:, None]
            attended = jax.nn.dot_product_attention(query, past["key"], past["value"], mask=causal[None, None])
        x = x + self.out(attended.reshape(x.shape))
        # The square of a ReLU (Primer) learns as well as a GELU, and its backward pass keeps one array, not several.
        return x + self.down(jnp.square(nnx.relu(self.up(self.norm2(x)))))


class Transformer(nnx.Module):
    """Tokens (batch, length) to hidden states (batch, length, features); the logits are `hidden @ embedding.T`."""

    def __init__(self, settings, rngs):
        self.embed = nnx.Embed(settings.vocab, settings.features, embedding_init=INIT, rngs=rngs)
        self.blocks = nnx.List([Block(settings.features, settings.heads, rngs) for _ in range(settings.layers)])
        self.norm = nnx.RMSNorm(settings.features, rngs=rngs)

    def __call__(self, tokens, past=None, start=0):
        # The embedding serves small at the output; at the input it is brought to the size of what the blocks add.
        x = self.embed(tokens) * math.sqrt(self.embed.features)
        for i, block in enumerate(self.blocks):
            x = block(x, None if past is None else past[i], start)
        return self.norm(x)

    def no_past(self, batch, length):
        """Room for the keys and values of `length` positions, of each block."""
        heads, features = self.blocks[0].heads, self.embed.features
        room = jnp.zeros((batch, length, heads, features // heads))
        return [{"key": room, "value": room} for _ in self.blocks]


def jxent_loss(hidden, embedding, labels):
    # The default is at least 256 positions, for speed: half of so small a step.
    return jxent.linear_cross_entropy(hidden, embedding, labels, vocab_axis=0, block_size=BLOCK_SIZE)


def full_logits_loss(hidden, embedding, labels):
    """The usual way, which holds all logits: compiled for its memory figure, never run."""
    counts = labels != -100
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ embedding.T, jnp.where(counts, labels, 0))
    return jnp.sum(losses, where=counts) / jnp.sum(counts)


def mean_loss(model, tokens, loss=jxent_loss, labels=None):
    labels = jxent.next_token_labels(tokens) if labels is None else labels
    return loss(model(tokens), model.embed.embedding, labels)


@nnx.jit(static_argnames="loss")
def train_step(model, optimizer, tokens, loss=jxent_loss, labels=None):
    value, grads = nnx.value_and_grad(mean_loss)(model, tokens, loss, labels)
    optimizer.update(model, grads)
    return value


@nnx.jit
def eval_step(model, tokens):
    return mean_loss(model, tokens)


def evaluate(model, batches):
    return float(np.mean([eval_step(model, batch) for batch in batches]))


def update_rule(settings):
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=settings.steps // 10,
        decay_steps=settings.steps,
        end_value=settings.learning_rate / 20,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))


def draw_from_best(logits, key):
    best, indices = jax.lax.top_k(logits / 0.8, 40)
    chosen = jax.random.categorical(key, best)
    return jnp.take_along_axis(indices, chosen[:, None], axis=1)[:, 0]


@nnx.jit(static_argnames=("start", "draw"))
def generate(model, tokens, start, key, draw=draw_from_best):
    """Fills `tokens` (batch, length) from `start` on; `draw(logits, key)` draws the next token of each row."""

    def write_next(i, carry):
        tokens, past, hidden = carry
        drawn = draw(hidden @ model.embed.embedding.T, jax.random.fold_in(key, i))
        return tokens.at[:, i].set(drawn), past, model(drawn[:, None], past, i)[:, 0]

    past = model.no_past(*tokens.shape)
    hidden = model(tokens[:, :start], past)[:, -1]
    return jax.lax.fori_loop(start, tokens.shape[1], write_next, (tokens, past, hidden))[0]


def temporaries(model, optimizer, tokens, loss, labels=None):
    """Bytes that the compiled training step holds besides its arguments and results."""
    return train_step.lower(model, optimizer, tokens, loss, labels).compile().memory_analysis().temp_size_in_bytes


def milliseconds(model, tokens, labels):
    """The time of the loss and its gradients, given the hidden states; the median of seven calls, after one more."""
    f = jax.jit(jax.value_and_grad(partial(jxent.linear_cross_entropy, vocab_axis=0), (0, 1)))
    args = model(tokens), model.embed.embedding[...], labels
    times = timeit.repeat(lambda: jax.block_until_ready(f(*args)), number=1, repeat=8)
    return 1000 * statistics.median(times[1:])


def print_memory(what, ours, full):
    """Of programs with jxent and with full logits, the bytes that they hold besides their arguments and results."""
    mib = ours / 2**20, full / 2**20
    print(
        f"Temporaries of {what}: {mib[0]:.3g} MiB with jxent, {mib[1]:.3g} MiB with full logits ({full / ours:.1f}x)."
    )


def save(manager, model, optimizer, settings, history):
    """Writes a checkpoint named by its step: a step has one training loss."""
    manager.save(
        len(history["training"]),
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(nnx.state((model, optimizer))),
            run=ocp.args.JsonSave({"settings": dataclasses.asdict(settings), "history": history}),
        ),
    )


def restore(manager, model, optimizer, settings):
    """Brings the model and the optimizer to the last checkpoint, if there is one, and returns the history."""
    step = manager.latest_step()
    if step is None:
        print("no checkpoint: starting anew")
        return {"training": [], "heldout": []}
    run = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
    if run["settings"] != dataclasses.asdict(settings):
        sys.exit(f"{manager.directory} holds a run with other settings: give them, or another --out")
    state = nnx.state((model, optimizer))
    restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state)))
    nnx.update((model, optimizer), restored.state)
    print(f"continuing from the checkpoint of step {step} of {settings.steps}")
    return run["history"]


def train(settings, training, heldout, out, stop_at):
    """Trains until step `stop_at` or Ctrl-C, from the last checkpoint if there is one, and leaves a checkpoint."""
    model = Transformer(settings, nnx.Rngs(settings.seed))
    optimizer = nnx.Optimizer(model, update_rule(settings), wrt=nnx.Param)
    tokens_per_step = settings.batch * settings.length

    # Written at once, not in the background, where the history would grow under the writer's hands.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager((out / "checkpoints").absolute(), options=options) as manager:
        history = restore(manager, model, optimizer, settings)
        if not history["heldout"]:
            history["heldout"].append([0, evaluate(model, heldout)])
        before = history["heldout"][0][1]
        print(f"held-out perplexity before training: {math.exp(before):,.0f}")
        done = len(history["training"])
        initial, total = done * tokens_per_step, settings.steps * tokens_per_step
        progress = tqdm(desc="training", initial=initial, total=total, unit=" tokens", unit_scale=True)
        interrupted = threading.Event()  # Ctrl-C lets the step finish, so that model and optimizer are saved in step
        previous_handler = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
        for step in range(done, stop_at):
            loss = float(train_step(model, optimizer, training_batch(settings, training, step)))
            history["training"].append(loss)
            done = step + 1
            if done % settings.eval_every == 0 or done == settings.steps:
                history["heldout"].append([done, evaluate(model, heldout)])
            if done % settings.save_every == 0 and done < stop_at:
                save(manager, model, optimizer, settings, history)
            progress.update(tokens_per_step)
            progress.set_postfix_str(f"step {done}, loss {loss:.2f}, held-out {history['heldout'][-1][1]:.2f}")
            if interrupted.is_set():
                break
        progress.close()
        if manager.latest_step() != done:
            save(manager, model, optimizer, settings, history)
    signal.signal(signal.SIGINT, previous_handler)
    if interrupted.is_set():
        sys.exit(f"interrupted: step {done} is saved in {out}, the same command continues")
    return model, optimizer, history


def plot(history, path):
    """Writes the training and held-out curves to an image file."""
    steps, heldout = zip(*history["heldout"], strict=True)
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(history["training"], color="tab:blue", lw=0.8, alpha=0.3, label="training, each step's batch")
    window = min(50, len(history["training"]))
    means = np.convolve(history["training"], np.full(window, 1 / window), mode="valid")
    axes.plot(np.arange(len(means)) + window / 2, means, color="tab:blue", label=f"training, mean of {window} steps")
    axes.plot(steps, heldout, "o-", ms=4, color="tab:orange", label=f"held-out, {heldout[-1]:.2f} at the end")
    axes.set(
        title="Python's standard library: a small transformer trained with jxent.linear_cross_entropy",
        xlabel="step",
        ylabel="loss (nats per token)",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def sample(model, tokenizer, settings):
    """Returns the prompt and what the model makes of it, up to its context's length."""
    prompt = tokenizer.encode(PROMPT).ids
    tokens = np.zeros((1, settings.length), np.int32)
    tokens[0, : len(prompt)] = prompt
    tokens = generate(model, tokens, len(prompt), jax.random.key(settings.seed))
    return tokenizer.decode(np.asarray(tokens[0]).tolist(), skip_special_tokens=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="train_lm", help="folder of all that is written, and read to continue a run")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--seed", type=int, help="of the model, the batches and the sample")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, stopped halfway and continued")
    args = parser.parse_args()

    given = {name: getattr(args, name) for name in ("steps", "vocab", "seed") if getattr(args, name) is not None}
    settings = dataclasses.replace(SMOKE if args.smoke else Settings(), **given)
    out = Path(args.out)
    if args.smoke:
        out /= "smoke"
        shutil.rmtree(out, ignore_errors=True)  # so that it starts anew each time
    out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    tokenizer, training, heldout, bytes_per_token = prepare_data(settings, out)
    batches = heldout_batches(settings, heldout)
    if args.smoke:
        train(settings, training, batches, out, stop_at=settings.steps // 2)
    model, optimizer, history = train(settings, training, batches, out, stop_at=settings.steps)

    print(f"\n{sample(model, tokenizer, settings)}\n")
    plot(history, out / "curves.png")
    before, after = history["heldout"][0][1], history["heldout"][-1][1]
    batch = training_batch(settings, training, step=0)
    print(f"held-out perplexity  {math.exp(before):,.0f} before training, {math.exp(after):,.1f} after")
    print(f"bits per byte        {after / math.log(2) / bytes_per_token:.2f}")
    print(f"curves               {out / 'curves.png'}")
    print(f"all of it took       {time.perf_counter() - start:.0f} s")
    ours, full = (temporaries(model, optimizer, batch, loss) for loss in (jxent_loss, full_logits_loss))
    print_memory("the training step", ours, full)


if __name__ == "__main__":
    main()
