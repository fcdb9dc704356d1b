"""Distil a language model into one of a third of its size with `jxent.linear_kl_divergence`, and with what is like it.

The teacher is the model of train_lm.py, trained here if it has not been. Students start alike and see the same batches:
one learns from the text alone, the others half from the text and half from the teacher, by the forward divergence
KL(teacher || student), the reverse one, Jensen-Shannon, and from the teacher's 16 most probable tokens, as you would
store them (`jxent.linear_top_k`): with probabilities that add up to 1, and with all other tokens as a 17th. Neither
model's logits are held; the last line says what that saves.

    pip install jxent flax optax orbax-checkpoint tokenizers matplotlib tqdm
    python distill.py            # the full run; everything it writes goes to distill/
    python distill.py --smoke    # seconds, to see that everything works
"""

import argparse
import dataclasses
import math
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import train_lm
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import jxent

TOP = 16  # tokens that are kept of a teacher
OF_TEACHER = 0.5  # the share of the teacher in the loss; the text has the rest


def student_settings(teacher, steps):
    """A third of the parameters, most of which are the embedding's."""
    features = 7 * teacher.features // 16
    features -= features % (2 * teacher.heads)
    return dataclasses.replace(teacher, features=features, layers=max(1, teacher.layers // 2), steps=steps)


# --- the losses: functions of the teacher's and the student's hidden states and embeddings ----------------------------

OPTIONS = {"vocab_axis": 0, "block_size": train_lm.BLOCK_SIZE}


def forward(teacher, student, where):
    return jxent.linear_kl_divergence(*teacher, *student, where=where, **OPTIONS)


def reverse(teacher, student, where):
    return jxent.linear_kl_divergence(*student, *teacher, where=where, **OPTIONS)


def jensen_shannon(teacher, student, where):
    return jxent.linear_js_divergence(*teacher, *student, where=where, **OPTIONS)


def most_probable(teacher, where):
    """The teacher's most probable tokens, which here are found anew in each step."""
    return jax.lax.stop_gradient(jxent.linear_top_k(*teacher, TOP, where=where, **OPTIONS))


def top_tokens(teacher, student, where):
    """The cross-entropy of those tokens, with probabilities that add up to 1."""
    top = most_probable(teacher, where)
    labels = jxent.SparseLabels(top.indices, jxent.softmax(top.log_probs))
    return jxent.linear_cross_entropy(*student, labels, where=where, **OPTIONS)


def top_and_rest(teacher, student, where):
    """KL(teacher || student) of those tokens and one more, which stands for all others."""
    top = most_probable(teacher, where)
    of_student = jxent.linear_log_probs(*student, top.indices, where=where, **OPTIONS)
    of_both = (jnp.concatenate([each.log_probs, each.log_rest[..., None]], -1) for each in (top, of_student))
    return jxent.kl_divergence(*of_both, where=where)


def dense(teacher, student, where):
    """The usual way, which holds the logits of both: compiled for its memory figure, never run."""
    log_p, log_q = (jax.nn.log_softmax(hidden @ embedding.T) for hidden, embedding in (teacher, student))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1), where=where)


METHODS = {
    "text alone": None,
    "forward KL": forward,
    "reverse KL": reverse,
    "JS": jensen_shannon,
    f"the teacher's top {TOP}": top_tokens,
    f"top {TOP} and the rest": top_and_rest,
}


def loss_of(student, teacher, tokens, divergence):
    hidden, embedding = student(tokens), student.embed.embedding
    labels = jxent.next_token_labels(tokens)
    text = jxent.linear_cross_entropy(hidden, embedding, labels, **OPTIONS)
    if divergence is None:
        return text
    # The teacher is frozen, so that its logits take one matmul and nothing else.
    of_teacher = jax.lax.stop_gradient((teacher(tokens), teacher.embed.embedding))
    return (1 - OF_TEACHER) * text + OF_TEACHER * divergence(of_teacher, (hidden, embedding), labels != -100)


@nnx.jit(static_argnames="divergence")
def step(student, optimizer, teacher, tokens, divergence):
    value, grads = nnx.value_and_grad(loss_of)(student, teacher, tokens, divergence)
    optimizer.update(student, grads)
    return value


def distil(name, settings, teacher, training, heldout, progress):
    """The held-out losses of a student by step, and the student's number of parameters."""
    student = train_lm.Transformer(settings, nnx.Rngs(settings.seed))
    optimizer = nnx.Optimizer(student, train_lm.update_rule(settings), wrt=nnx.Param)
    curve = [(0, train_lm.evaluate(student, heldout))]
    for i in range(settings.steps):
        batch = train_lm.training_batch(settings, training, i)
        step(student, optimizer, teacher, batch, METHODS[name])
        if (i + 1) % settings.eval_every == 0 or i + 1 == settings.steps:
            curve.append((i + 1, train_lm.evaluate(student, heldout)))
        progress.update()
        progress.set_postfix_str(f"{name}: held-out {curve[-1][1]:.2f}")
    return curve


def parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def temporaries(settings, teacher, tokens, divergence):
    """Bytes that the compiled step holds besides its arguments and results."""
    student = train_lm.Transformer(settings, nnx.Rngs(0))
    optimizer = nnx.Optimizer(student, train_lm.update_rule(settings), wrt=nnx.Param)
    compiled = step.lower(student, optimizer, teacher, tokens, divergence).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def plot(curves, of_teacher, path):
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), "o-", ms=3, label=f"{name}: perplexity {math.exp(curve[-1][1]):.1f}")
    axes.axhline(of_teacher, color="0.4", ls="--", lw=1, label=f"the teacher: {math.exp(of_teacher):.1f}")
    axes.set(title="Students of a third of the size", xlabel="step", ylabel="held-out loss (nats per token)")
    axes.set_ylim(of_teacher - 0.2, sorted(curve[len(curve) // 5][1] for curve in curves.values())[-1] + 0.2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("distill"), help="folder of all that is written")
    parser.add_argument("--steps", type=int, help="of each student, 250 if not given")
    parser.add_argument("--smoke", action="store_true", help="a tiny teacher and tiny students")
    args = parser.parse_args()
    settings = train_lm.SMOKE if args.smoke else train_lm.Settings()
    of_students = student_settings(settings, args.steps or (10 if args.smoke else 250))
    out = args.out / "smoke" if args.smoke else args.out
    out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    _, training, heldout, _ = train_lm.prepare_data(settings, out)
    batches = train_lm.heldout_batches(settings, heldout)
    teacher, _, history = train_lm.train(settings, training, batches, out, stop_at=settings.steps)
    of_teacher = history["heldout"][-1][1]
    total = len(METHODS) * of_students.steps
    with tqdm(desc="students", total=total, unit=" steps") as progress:
        run = partial(distil, settings=of_students, teacher=teacher, training=training, heldout=batches)
        curves = {name: run(name, progress=progress) for name in METHODS}
    plot(curves, of_teacher, out / "students.png")

    student = train_lm.Transformer(of_students, nnx.Rngs(0))
    print(f"\nparameters   {parameters(teacher):,} of the teacher, {parameters(student):,} of each student")
    print(f"perplexity   {math.exp(of_teacher):.1f} of the teacher, held out")
    for name, curve in curves.items():
        print(f"             {math.exp(curve[-1][1]):.1f} of the student from {name}")
    print(f"curves       {out / 'students.png'}")
    print(f"it took      {time.perf_counter() - start:.0f} s")
    batch = train_lm.training_batch(of_students, training, 0)
    ours, full = (temporaries(of_students, teacher, batch, f) for f in (forward, dense))
    train_lm.print_memory("a step by forward KL", ours, full)


if __name__ == "__main__":
    main()
