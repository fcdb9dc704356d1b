"""How the package reads: annotations, records built by keywords, questions that a contract answers.

Each rule is read from the syntax trees of the files, so that a change that breaks it is named with its line.
"""

import ast
import pathlib
import re

import pytest

import jxent

ROOT = pathlib.Path(jxent.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
FOLDERS = sorted({name.split("/")[0] for name in FILES if "/" in name})


def nodes(kind):
    return [
        (f"{name}:{node.lineno}", node)
        for name, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, kind)
    ]


def is_record(node):
    """Whether a class is a NamedTuple or a dataclass."""
    texts = map(ast.unparse, [*node.bases, *node.decorator_list])
    return any(text == "NamedTuple" or text.startswith("dataclass") for text in texts)


def test_records_are_built_by_keywords():
    # `Class` and `Pair` are what formulas are made of, and `SparseLabels` is what callers write.
    by_position = {"Class", "Pair", "SparseLabels"}
    records = {node.name for _, node in nodes(ast.ClassDef) if is_record(node)} - by_position
    assert len(records) > 20
    wrong = []
    for place, call in nodes(ast.Call):
        name = ast.unparse(call.func).split(".")
        if name[-1] in ("_make", "astuple") or (name[-1] in records and call.args):
            wrong.append(f"{place} {ast.unparse(call):.60}")
    assert not wrong, wrong


def arguments(function):
    every = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    every += [more for more in (function.args.vararg, function.args.kwarg) if more is not None]
    return [argument for argument in every if argument.arg not in ("self", "cls", "_")]


@pytest.mark.parametrize("folder", ["", *FOLDERS])
def test_arguments_and_results_are_annotated(folder):
    functions = [
        (place, node)
        for place, node in nodes((ast.FunctionDef,))
        if (place.startswith(folder + "/") if folder else "/" not in place)
    ]
    missing = [
        f"{place} {node.name}" for place, node in functions if any(a.annotation is None for a in arguments(node))
    ]
    missing += [f"{place} {node.name} ->" for place, node in functions if node.returns is None]
    assert not missing, missing


def test_kinds_are_asked_for_in_their_own_folders():
    """What the labels are, what is computed, and for which platform, are answered by methods of a contract."""
    implementations = {
        "IndexLabels": ("_labels/", "_call/label_checks.py"),
        "ProbabilityLabels": ("_labels/", "_call/label_checks.py"),
        "EntryLabels": ("_labels/", "_call/label_checks.py"),
        "CPU": ("_backend/",),
        "XLA": ("_backend/",),
    }
    wrong = []
    for place, node in nodes(ast.Name):
        if node.id in implementations and not place.startswith(implementations[node.id]):
            wrong.append(f"{place} {node.id}")
    for place, call in nodes(ast.Call):
        if ast.unparse(call.func) == "isinstance" and ast.unparse(call.args[1]) in {
            *implementations,
            "Labels",
            "Objective",
        }:
            wrong.append(f"{place} {ast.unparse(call)}")
    for place, node in nodes(ast.Compare):
        if "divergence" in ast.unparse(node.left) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            wrong.append(f"{place} {ast.unparse(node)}")
    assert not wrong, wrong


DESIGN = (ROOT.parent / "docs" / "project" / "design.md").read_text(encoding="utf-8")


def test_glossary():
    """Each entry that is code is used; contracts, and what they hand around, are in docs/project/design.md."""
    table = DESIGN.partition("## Glossary\n")[2].partition("\n## ")[0]
    entries = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)[1:]
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py"))
    unused = [
        word
        for entry in entries
        for word in re.findall(r"`?(\w[\w ]*)`?", entry)
        if not re.search(rf"\b{word}\b", text)
    ]
    assert len(entries) > 15
    assert not unused
    contracts = {node.name for _, node in nodes(ast.ClassDef) if "abc.ABC" in map(ast.unparse, node.bases)}
    coined = {"Passes", "Class", "Pair", "Scalars", "Shards", "ClassAxis", "Placement"} | contracts - {"Fault"}
    assert {name for name in coined if f"`{name}`" not in DESIGN} == set()


def test_files_in_the_table_of_parts():
    folders = {name.split("/")[0] for name in FILES if "/" in name}
    modules = {name.removesuffix(".py") for name in FILES if "/" not in name} - {"__init__"}
    table = DESIGN.partition("## Where things are\n")[2].partition("\n## ")[0]
    assert {f"`{name}/`" for name in folders} <= set(re.findall(r"`_\w+/`", table))
    assert {f"`{name}`" for name in modules} <= set(re.findall(r"`_\w+`", table))
