"""Names of other libraries for arguments: each leads to the right one here, or to what to write, and none to another.

`names_elsewhere.txt` is the table, of more than 110 names over all functions.
"""

import inspect
import re
from pathlib import Path

import pytest

import jxent
from jxent._call.elsewhere import ELSEWHERE

LINES = (Path(__file__).parent / "names_elsewhere.txt").read_text(encoding="utf-8").splitlines()
FUNCTIONS = [name for name in jxent.__all__ if name.islower()]
GROUPS = {}
for group, members in re.findall(r"^# (\w+): ([\w ]+)$", "\n".join(LINES), re.MULTILINE):
    GROUPS[group] = [function for member in members.split() for function in GROUPS.get(member, [member])]


def table():
    """name -> function -> the answer, of functions that have one."""
    answers, names = {}, []
    for line in LINES:
        if line.startswith("    "):
            answer, _, functions = line.strip().rpartition(": ")
            of_line = [function for word in functions.split() for function in GROUPS.get(word, [word])]
            for name in names:
                answers[name] |= dict.fromkeys(of_line, answer)
        elif line and not line.startswith("#"):
            names = re.findall(r"(\w+) \([^()]+\)", line)
            answers |= {name: {} for name in names}
    return answers


TABLE = table()


def parameters(function):
    return [*inspect.signature(getattr(jxent, function)).parameters]


def said(function, name):
    with pytest.raises(TypeError) as raised:
        getattr(jxent, function)(**{name: 1})
    start, message = f"{function}: there is no argument {name}; ", str(raised.value)
    assert message.startswith(start)
    return message.removeprefix(start)


def test_the_table_covers_what_is_known():
    assert len(TABLE) >= 110
    assert TABLE.keys() == ELSEWHERE.keys()
    assert {function for answers in TABLE.values() for function in answers} == set(FUNCTIONS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_name_of_another_library(function):
    here = parameters(function)
    for name, answers in TABLE.items():
        if name in here:
            assert function not in answers, name
            continue
        answer, message = answers.get(function), said(function, name)
        if answer is None:
            assert message == f"it has {', '.join(here)}", name
        elif answer.startswith('"'):
            assert answer.strip('"') in message, (name, message)
        else:
            right = answer.split(" or ")
            assert set(right) <= set(here), name
            named = re.sub(r"\([^()]*(\([^()]*\)[^()]*)?\)", "", message).split()
            opening = "it is called" if len(right) == 1 else "it may be"
            assert message.startswith(f"{opening} {right[0]}"), (name, message)
            assert [word for word in named if word in here] == right, (name, message)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_merely_similar_is_a_question(function):
    """Of an argument that some other function has, of a typing mistake, and of a name that nobody knows."""
    here = parameters(function)
    elsewhere = {name for other in FUNCTIONS for name in parameters(other)} - {*here} - TABLE.keys()
    for name in [
        *elsewhere,
        "colour",
        "logits_scale",
        "label_smooth",
        *(name[:-2] + name[:-3:-1] for name in here if len(name) > 1),
    ]:
        message = said(function, name)
        assert re.fullmatch(rf"(did you mean ({'|'.join(here)})\? It|it) has {', '.join(here)}", message), message


@pytest.mark.parametrize(
    ("function", "wrong", "right"),
    [
        ("cross_entropy", "lables", "labels"),
        ("cross_entropy", "label_smooth", "label_smoothing"),
        ("linear_cross_entropy", "blocksize", "block_size"),
        ("kl_divergence", "temperture", "temperature"),
    ],
)
def test_a_typing_mistake(function, wrong, right):
    assert said(function, wrong).startswith(f"did you mean {right}? ")
