"""Arguments by the names that other libraries give them: an error that says the name here."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

REDUCTIONS = '"mean", "sum" or "none"'
LAYOUT = "with vocab_axis=0 where its shape is (vocab, features)"
AT_ONCE = "the number of positions at once"

ELSEWHERE = {
    # PyTorch
    "input": (("logits", "log_probs", "hidden", "tokens", "logits_q"), ""),
    "target": (("labels", "logits_p"), ""),
    "dim": (("axis",), ""),
    "weight": (("class_weight",), "one number per class; sample_weight has one per position"),
    "linear_weight": (("kernel",), LAYOUT),
    "linear_bias": (("bias",), ""),
    "keepdim": (("keepdims",), ""),
    "size_average": (("reduction",), REDUCTIONS),
    "reduce": (("reduction",), REDUCTIONS),
    "chunking_strategy": (("block_size",), AT_ONCE),
    # Optax, Flax, Keras
    "x": (("logits", "log_probs", "hidden"), ""),
    "targets": (("labels",), ""),
    "y_true": (("labels",), ""),
    "y_pred": (("logits", "log_probs"), ""),
    "mask": (("where",), "boolean, True where a position counts"),
    "weights": (("sample_weight",), "one number per position; class_weight has one per class"),
    # language models
    "pad_token_id": (("ignore_index",), ""),
    "ignored_index": (("ignore_index",), ""),
    "chunk_size": (("block_size",), AT_ONCE),
    "num_chunks": (("block_size",), AT_ONCE),
    "embedding": (("kernel",), LAYOUT),
    "smoothing": (("label_smoothing",), ""),
    "z_loss": (("z_loss_weight",), ""),
    "lse_square_scale": (("z_loss_weight",), ""),
    "softcap": (("logit_softcap",), ""),
    # distillation
    "teacher_logits": (("logits_p",), "the reverse divergence has the teacher second"),
    "student_logits": (("logits_q",), "the reverse divergence has the student first"),
    "teacher_input": (("hidden_p",), ""),
    "teacher_weight": (("kernel_p",), LAYOUT),
    "teacher_bias": (("bias_p",), ""),
    "student_input": (("hidden_q",), ""),
    "student_weight": (("kernel_q",), LAYOUT),
    "student_bias": (("bias_q",), ""),
    "tau": (("temperature",), ""),
}
"""Name elsewhere -> (the names that it may have here, of which a function has at most one; a remark)."""


def known_names(function: Callable[P, R]) -> Callable[P, R]:
    """Has a call with an unknown name, or with options by position, say the names that the function knows."""
    parameters = inspect.signature(function).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = [name for name in parameters if name not in positional]
    known = parameters.keys()

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > len(positional):
            raise TypeError(
                f"{function.__name__}: takes {', '.join(positional)} by position, got {len(args)}; options are "
                f"passed by name: {', '.join(options)}"
            )
        if not kwargs.keys() <= known:
            name = next(name for name in kwargs if name not in known)
            raise TypeError(f"{function.__name__}: there is no argument {name}{_suggestion(name, [*known])}")
        return function(*args, **kwargs)

    return named


def _suggestion(name, known):
    names, remark = ELSEWHERE.get(name, ((), ""))
    here = [other for other in names if other in known] or difflib.get_close_matches(name, known, n=1)
    if not here:
        return f"; it has {', '.join(known)}"
    return f"; it is called {here[0]} here" + (f" ({remark})" if remark else "")
