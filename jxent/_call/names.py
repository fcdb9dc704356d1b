"""An error for arguments passed by the names of other libraries: it says the name that jxent uses."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from jxent._call.elsewhere import ELSEWHERE, IS

P = ParamSpec("P")
R = TypeVar("R")


def known_names(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with errors for an unknown name or an option by position that say the right names."""
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
            raise TypeError(f"{function.__name__}: there is no argument {name}{_answer(name, [*known])}")
        return function(*args, **kwargs)

    return named


def _answer(name: str, known: list[str]) -> str:
    if name not in ELSEWHERE:
        # A similar name may be wrong. So the error asks a question, and lists all names.
        similar = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        return (f"; did you mean {similar[0]}? It has " if similar else "; it has ") + ", ".join(known)
    for answer in ELSEWHERE[name]:
        argument, _, what_to_do = answer.partition(": ")
        here = [other for other in argument.split("|") if other in known]
        if what_to_do and here:
            return f"; {what_to_do}"
        if len(here) == 1:
            return f"; it is called {here[0]} here" + _remark(here[0])
        if here:
            return "; it may be " + " or ".join(other + _remark(other) for other in here)
    return f"; it has {', '.join(known)}"


def _remark(name: str) -> str:
    return f" ({IS[name]})" if name in IS else ""
