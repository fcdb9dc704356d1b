"""Fine-tune the language model of train_lm.py on prompts and answers, with `jxent.linear_cross_entropy`.

A prompt is a function of Python's standard library, the answer is the summary that its docstring begins with. Prompts
and padding have labels of -100, and so count for nothing. The model is pre-trained here if it has not been. Held out
are the functions of files that it has not seen. grpo.py goes on from here.

    pip install jxent flax optax orbax-checkpoint tokenizers matplotlib tqdm
    python sft.py            # the full run; everything it writes goes to sft/
    python sft.py --smoke    # seconds, to see that everything works
"""

import argparse
import ast
import dataclasses
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import train_lm
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import jxent

PROMPT, ANSWER = 72, 24  # tokens at most; an answer's last one says that it ends
BEFORE_ANSWER = '\n"""'  # what follows is a docstring, as the pre-trained model knows


# --- the data ---------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    source: str  # of a function, without its docstring
    summary: str = ""


def examples_of(texts):
    """All functions with a docstring in the source code of modules."""
    found = []
    for text in texts:
        try:
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        except SyntaxError:  # files of templates, or of Python 2
            continue
        for node in nodes:
            if docstring := ast.get_docstring(node):
                summary = " ".join(docstring.split("\n\n")[0].split())
                node.body = node.body[1:] or [ast.Pass()]
                found.append(Example(ast.unparse(node), summary))
    return found


def encode(tokenizer, texts):
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def encode_prompts(tokenizer, examples):
    """Tokens (examples, PROMPT): each ends where its answer begins."""
    before_answer = tokenizer.encode(BEFORE_ANSWER).ids
    tokens = np.zeros((len(examples), PROMPT), np.int32)
    for row, ids in zip(tokens, encode(tokenizer, [example.source for example in examples]), strict=True):
        prompt = ids[: PROMPT - len(before_answer)] + before_answer
        row[-len(prompt) :] = prompt
    return tokens


def tokens_and_labels(tokenizer, examples):
    """Both (examples, PROMPT + ANSWER); of the examples whose answers are short enough."""
    end = tokenizer.token_to_id(train_lm.END_OF_FILE)
    answers = [[*ids, end] for ids in encode(tokenizer, [example.summary for example in examples])]
    prompts = encode_prompts(tokenizer, examples)
    short = [i for i, answer in enumerate(answers) if len(answer) <= ANSWER]
    tokens = np.array([[*prompts[i], *answers[i], *[end] * (ANSWER - len(answers[i]))] for i in short], np.int32)
    return tokens, answer_labels(tokens, end)


def answer_labels(tokens, end):
    """Of each position the next token where that is the answer's, up to its first `end`, and -100 elsewhere."""
    answer = np.arange(tokens.shape[1]) >= PROMPT
    ends = answer & (tokens == end)
    return jxent.next_token_labels(tokens, where=answer & (np.cumsum(ends, axis=1) - ends == 0))


# --- training ---------------------------------------------------------------------------------------------------------


@nnx.jit
def summed_loss(model, tokens, labels):
    return jxent.linear_cross_entropy(model(tokens), model.embed.embedding, labels, vocab_axis=0, reduction="sum")


def evaluate(model, data, batch):
    """The mean loss of all answers' tokens, in nats."""
    tokens, labels = (x[: len(x) // batch * batch].reshape(-1, batch, x.shape[1]) for x in data)
    return sum(float(summed_loss(model, *both)) for both in zip(tokens, labels, strict=True)) / np.sum(labels != -100)


def settings_of(smoke):
    """Of pre-training and of fine-tuning."""
    before = train_lm.SMOKE if smoke else train_lm.Settings()
    steps = {"steps": 10, "eval_every": 5} if smoke else {"steps": 250, "eval_every": 25}
    return before, dataclasses.replace(before, **steps, batch=16, learning_rate=1e-3)


def fine_tuned(smoke, out):
    """The model of this script, restored if it is there and trained if not, its tokenizer, and the examples."""
    before, settings = settings_of(smoke)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, *tokens, _ = train_lm.prepare_data(before, out)
    batches = train_lm.heldout_batches(before, tokens[1])
    model, *_ = train_lm.train(before, tokens[0], batches, out, stop_at=before.steps)
    training, heldout = map(examples_of, train_lm.read_sources(settings.files))
    with ocp.StandardCheckpointer() as checkpointer:
        path = (out / "fine_tuned").absolute()
        if path.exists():
            nnx.update(model, checkpointer.restore(path, nnx.state(model)))
        else:
            data = (tokens_and_labels(tokenizer, examples) for examples in (training, heldout))
            losses, curve = fine_tune(model, settings, *data)
            plot(losses, curve, out / "fine_tuning.png")
            checkpointer.save(path, nnx.state(model))
    return model, tokenizer, training, heldout


def fine_tune(model, settings, training, heldout):
    """Returns the loss of each step, and the held-out losses by step."""
    optimizer = nnx.Optimizer(model, train_lm.update_rule(settings), wrt=nnx.Param)
    losses, curve = [], [(0, evaluate(model, heldout, settings.batch))]
    with tqdm(range(settings.steps), desc="fine-tuning", unit=" steps") as progress:
        for i in progress:
            batch = batch_of(settings, training, i)
            losses.append(float(train_lm.train_step(model, optimizer, batch[0], labels=batch[1])))
            if (i + 1) % settings.eval_every == 0:
                curve.append((i + 1, evaluate(model, heldout, settings.batch)))
            progress.set_postfix_str(f"loss {losses[-1]:.2f}, held-out {curve[-1][1]:.2f}")
    print(f"perplexity of held-out answers: {math.exp(curve[0][1]):,.1f} before, {math.exp(curve[-1][1]):,.1f} after")
    return losses, curve


def batch_of(settings, data, step):
    rows = np.random.default_rng((settings.seed, step)).choice(len(data[0]), settings.batch, replace=False)
    return [x[rows] for x in data]


def answers(model, tokenizer, examples, seed=0, draw=train_lm.draw_from_best):
    """What the model says of functions: the texts, and tokens and labels as of `tokens_and_labels`."""
    prompts = encode_prompts(tokenizer, examples)
    tokens = np.hstack([prompts, np.zeros((len(prompts), ANSWER), np.int32)])
    tokens = np.asarray(train_lm.generate(model, tokens, PROMPT, jax.random.key(seed), draw))
    labels = answer_labels(tokens, tokenizer.token_to_id(train_lm.END_OF_FILE))
    return tokenizer.decode_batch([row[row != -100].tolist() for row in np.asarray(labels)]), tokens, labels


def plot(losses, curve, path):
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="tab:blue", lw=0.8, alpha=0.4, label="training, each step's batch")
    axes.plot(*zip(*curve, strict=True), "o-", ms=4, color="tab:orange", label="answers about unseen files")
    title = f"Summaries of functions: perplexity {math.exp(curve[0][1]):.0f} before, {math.exp(curve[-1][1]):.0f} after"
    axes.set(title=title, xlabel="step", ylabel="loss of the answers (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sft"), help="folder of all that is written")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    args = parser.parse_args()
    out = args.out / "smoke" if args.smoke else args.out
    if args.smoke:
        shutil.rmtree(out, ignore_errors=True)  # so that it starts anew each time
    model, tokenizer, training, heldout = fine_tuned(args.smoke, out)
    for example, answer in zip(heldout, answers(model, tokenizer, heldout[:6])[0], strict=False):
        print(f"\n{example.source.splitlines()[0]}\n    the model: {answer}\n    the file:  {example.summary}")

    _, settings = settings_of(args.smoke)
    data = tokens_and_labels(tokenizer, training)
    tokens, labels = batch_of(settings, data, 0)
    print(f"\nexamples   {len(training):,} for training, {len(heldout):,} held out (whole files)")
    counted, of_all = (train_lm.milliseconds(model, tokens, y) for y in (labels, jxent.next_token_labels(tokens)))
    print(f"labels     at {np.mean(labels != -100):.0%} of the positions")
    print(f"the loss   and its gradients take {counted:.0f} ms a batch, {of_all:.0f} if all positions had a label")
    print(f"curves     {out / 'fine_tuning.png'}")
    optimizer = nnx.Optimizer(model, train_lm.update_rule(settings), wrt=nnx.Param)
    losses = train_lm.jxent_loss, train_lm.full_logits_loss
    ours, full = (train_lm.temporaries(model, optimizer, tokens, loss, labels) for loss in losses)
    train_lm.print_memory("the training step", ours, full)


if __name__ == "__main__":
    main()
