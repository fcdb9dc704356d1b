"""Group-relative policy optimisation (GRPO) of the model of sft.py, with `jxent.linear_cross_entropy`.

The model says what a function does, and a program checks its answer: a sentence that begins with "Return" if, and only
if, the function returns something. Eight answers to each prompt are compared with each other. The policy's ratio, the
entropy bonus and the divergence from the model that it began with all come from the statistics of one call, which holds
no logits; the last line says what that saves. The call divides by the temperature at which answers are drawn. If all
answers to a prompt are right, or all are wrong, their group has no advantage and takes no part in the loss. Its
cotangents are then 0, and the backward pass skips it.

    pip install jxent flax optax orbax-checkpoint tokenizers matplotlib tqdm
    python grpo.py            # goes on from what sft.py wrote to sft/, or makes it; everything it writes goes there
    python grpo.py --smoke    # seconds, to see that everything works
"""

import argparse
import re
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sft
import train_lm
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import jxent

GROUP = 8  # answers to a prompt
TEMPERATURE = 1.0  # at which answers are drawn, and by which the loss divides the logits
UPDATES = 2  # of the policy for each set of answers
CLIP = 0.2  # how far the policy's ratio counts
KL_WEIGHT, ENTROPY_WEIGHT = 0.02, 0.002
LEARNING_RATE = 3e-4


def is_right(source, answer):
    """A sentence of at least three words, the first of which is "Return" if and only if there is a value to return."""
    returns = re.search(r"\breturn [^\n]", source) is not None
    return re.fullmatch(r"[A-Z]\w+( [^ .]+){2,}\.", answer) is not None and answer.startswith("Return ") == returns


class Rollouts(NamedTuple):
    tokens: np.ndarray  # (rollouts, length)
    labels: np.ndarray  # (rollouts, length), -100 where the next token is not of an answer
    advantages: np.ndarray  # (rollouts, 1)
    old: jax.Array | None = None  # log-probabilities of the answers' tokens, by the policy that drew them
    reference: jax.Array | None = None  # the same by the model that the policy was at the beginning


def roll_out(policy, tokenizer, sources, seed):
    """Answers to prompts, each drawn GROUP times, and which of them are right."""
    prompts = [sft.Example(source) for source in sources for _ in range(GROUP)]
    answers, tokens, labels = sft.answers(policy, tokenizer, prompts, seed, draw)
    rewards = np.array([is_right(prompt.source, answer) for prompt, answer in zip(prompts, answers, strict=True)])
    by_group = rewards.reshape(-1, GROUP)
    advantages = (by_group - by_group.mean(1, keepdims=True)) / (by_group.std(1, keepdims=True) + 1e-3)
    return Rollouts(tokens, labels, advantages.reshape(-1, 1)), rewards, answers


def draw(logits, key):
    return jax.random.categorical(key, logits / TEMPERATURE)


# --- the loss ---------------------------------------------------------------------------------------------------------


def from_blocks(hidden, embedding, labels):
    options = {"vocab_axis": 0, "temperature": TEMPERATURE, "reduction": "none", "block_size": train_lm.BLOCK_SIZE}
    _, stats = jxent.linear_cross_entropy(hidden, embedding, labels, **options, return_stats=True)
    return stats.log_prob, stats.entropy


def from_logits(hidden, embedding, labels):
    """The usual way, which holds all logits: compiled for its memory figure, never run."""
    log_p = jax.nn.log_softmax(hidden @ embedding.T / TEMPERATURE)
    of_labels = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return of_labels, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def of_answers(model, rollouts, statistics=from_blocks):
    """The log-probability and the entropy of each token of the answers, whose places in the rows are known."""
    labels = rollouts.labels[:, sft.PROMPT - 1 : -1]
    return labels, *statistics(model(rollouts.tokens)[:, sft.PROMPT - 1 : -1], model.embed.embedding, labels)


def loss_of(policy, rollouts, statistics):
    labels, log_prob, entropy = of_answers(policy, rollouts, statistics)
    ratio = jnp.exp(log_prob - rollouts.old)
    gain = jnp.minimum(ratio * rollouts.advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * rollouts.advantages)
    behind = rollouts.reference - log_prob
    divergence = jnp.expm1(behind) - behind  # Schulman's estimate from samples: its mean is KL(policy || reference)
    counts = (labels != -100) & (rollouts.advantages != 0)

    def mean(values):
        return jnp.sum(jnp.where(counts, values, 0)) / jnp.maximum(jnp.sum(counts), 1)

    loss = mean(KL_WEIGHT * divergence - gain - ENTROPY_WEIGHT * entropy)
    return loss, (mean(divergence), mean(entropy))


@nnx.jit(static_argnames="statistics")
def update(policy, optimizer, rollouts, statistics=from_blocks):
    (_, measured), grads = nnx.value_and_grad(loss_of, has_aux=True)(policy, rollouts, statistics)
    optimizer.update(policy, grads)
    return measured


@nnx.jit
def log_probs(model, rollouts):
    return of_answers(model, rollouts)[1]


# --- the run ----------------------------------------------------------------------------------------------------------


def plot(history, heldout, path):
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    top, middle, bottom = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    rewards, divergences, entropies = zip(*history, strict=True)
    top.plot(rewards, lw=0.8, alpha=0.4, label="each step's answers")
    top.plot(*zip(*heldout, strict=True), "o-", ms=4, label="functions of unseen files")
    top.set(title="Answers that are right, by the checking program", ylim=(0, 1))
    top.legend(loc="lower right")
    middle.plot(divergences)
    middle.set(ylabel="KL (nats)")
    bottom.plot(entropies)
    bottom.set(ylabel="entropy (nats)", xlabel="step")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sft"), help="the folder of sft.py")
    parser.add_argument("--steps", type=int, help="of GRPO, each with answers of its own")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    args = parser.parse_args()
    out = args.out / "smoke" if args.smoke else args.out
    policy, tokenizer, training, heldout = sft.fine_tuned(args.smoke, out)
    steps, prompts, every = (4, 2, 2) if args.smoke else (args.steps or 60, 8, 10)
    training, heldout = (sources_of(examples, tokenizer) for examples in (training, heldout))
    reference = nnx.clone(policy)
    update_rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE))
    optimizer = nnx.Optimizer(policy, update_rule, wrt=nnx.Param)
    unseen = [heldout[i] for i in np.random.default_rng(0).choice(len(heldout), 4 * prompts, replace=False)]

    def examine():
        _, rewards, answers = roll_out(policy, tokenizer, unseen, seed=0)
        return rewards.mean(), answers[::GROUP]

    start = time.perf_counter()
    before, answers_before = examine()
    history, curve, without = [], [(0, before)], 0.0
    with tqdm(range(steps), desc="GRPO", unit=" steps") as progress:
        for i in progress:
            chosen = np.random.default_rng(i).choice(len(training), prompts, replace=False)
            rollouts, rewards, _ = roll_out(policy, tokenizer, [training[j] for j in chosen], seed=i + 1)
            rollouts = rollouts._replace(old=log_probs(policy, rollouts), reference=log_probs(reference, rollouts))
            for _ in range(UPDATES):
                divergence, entropy = map(float, update(policy, optimizer, rollouts))
            without += np.mean(rollouts.advantages == 0) / steps
            history.append((rewards.mean(), divergence, entropy))
            if (i + 1) % every == 0 or i + 1 == steps:
                after, answers_after = examine()
                curve.append((i + 1, after))
            progress.set_postfix_str(f"right {rewards.mean():.0%}, held-out {curve[-1][1]:.0%}, KL {divergence:.2f}")
    plot(history, curve, out / "grpo.png")
    print(f"\nright answers  {before:.0%} before, {after:.0%} after, about functions of unseen files")
    for source, old, new in zip(unseen[:6], answers_before, answers_after, strict=False):
        print(f"\n{source}\n    before: {old}\n    after:  {new}")
    print(f"\n{without:.0%} of the answers were in groups without an advantage, which the backward pass skips")
    print(f"it took {time.perf_counter() - start:.0f} s")
    programs = [update.lower(policy, optimizer, rollouts, f).compile() for f in (from_blocks, from_logits)]
    train_lm.print_memory("an update", *(program.memory_analysis().temp_size_in_bytes for program in programs))


def sources_of(examples, tokenizer):
    """Of the functions that fit into a prompt."""
    sources = [example.source for example in examples]
    return [s for s, ids in zip(sources, sft.encode(tokenizer, sources), strict=True) if len(ids) < sft.PROMPT - 4]


if __name__ == "__main__":
    main()
