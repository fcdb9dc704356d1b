"""README.md and docs/: the Python of each page runs as it stands, and every link leads to a file and a heading."""

import functools
import html
import importlib.util
import re
import textwrap
import tomllib
from pathlib import Path

import prose as english
import pytest
import quickstart_notebook

import jxent

ROOT = Path(__file__).parent.parent
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HOSTED = PROJECT["urls"]["Repository"] + "/blob/main/"  # for what is not below docs/
# A page about a library that the `test` extra does not install: the module that it imports, and what installs it.
OTHERS = {
    "docs/in-your-code/equinox.md": ("equinox", "equinox"),
    "docs/in-your-code/keras.md": ("keras", "keras"),
    "docs/in-your-code/tunix.md": ("tunix", "google-tunix"),
}
FENCE = re.compile(r"^([ \t]*)(`{3,})([^\n`]*)\n(.*?)^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)


def python_of(text):
    """The Python of a page, whose fences may be inside of lists, tabs and admonitions."""
    return [textwrap.dedent(code) for _, _, info, code in FENCE.findall(text) if info.split()[:1] == ["python"]]


WITH_PYTHON = [page for page, text in PAGES.items() if "```python" in text]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_code_blocks_run(page):
    """One after the other, in one namespace."""
    blocks = python_of(PAGES[page])
    assert len(blocks) == len(re.findall("```python", PAGES[page]))
    module, package = OTHERS.get(page, ("jax", "jax"))
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"THE CODE OF {page} DID NOT RUN, because {module} is not installed: pip install {package}")
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


def test_python_inside_of_tabs_and_admonitions_is_found():
    page = textwrap.dedent("""
    ```python
    a = 1
    ```

    ```text
    not = Python
    ```

    === "A tab"

        !!! note
            ```python title="x.py"
            if a:
                b = 2
            ```
    """)
    assert python_of(page) == ["a = 1\n", "if a:\n    b = 2\n"]


def prose(text):
    """Without code, in which brackets are no links."""
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "code", FENCE.sub("", text), flags=re.DOTALL)


def links(text):
    """Those that lead to a place of this repository, by its address or relatively: (path, anchor)."""
    found = re.findall(r"\]\(<?([^)>\s]*)>?(?:\s+\"[^\"]*\")?\)|(?:href|src)=\"([^\"]*)\"", prose(text))
    found += [(target, "") for target in re.findall(r"^\[[^\]]+\]: <?([^>\s]+)", prose(text), re.MULTILINE)]
    targets = [html.unescape(first or second).replace(HOSTED, f"{ROOT}/") for first, second in found]
    return [target.partition("#")[::2] for target in targets if not re.match(r"[a-z]+:", target)]


def slug(heading):
    """The anchor of a heading in GitHub's pages; in the site's too, where no two of its hyphens meet."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@functools.cache
def anchors(path):
    """Of headings, of what mkdocstrings puts in, and of plain HTML."""
    text = (ROOT / path).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+?)#*$", FENCE.sub("", text), re.MULTILINE)
    return {
        *(anchor for anchor in map(slug, headings) if "--" not in anchor),
        *re.findall(r"^::: (\S+)", text, re.MULTILINE),
        *re.findall(r"\bid=\"([^\"]+)\"", text),
    }


def broken(page, text):
    wrong = []
    for path, anchor in links(text):
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists():
            wrong.append(f"{path}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.resolve()):
            wrong.append(f"{path}#{anchor}: no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    assert broken(page, PAGES[page]) == []


def test_broken_links_are_found():
    text = f"[x]({HOSTED}no.py) [y]({HOSTED}examples/sft.py) "
    text += "[a](nowhere.md) ![b](docs/figures/no.png) [c](docs/index.md#no-such) [d](https://no.example) `[e](no.md)`"
    wrong = [
        f"{ROOT}/no.py: no such file",
        "nowhere.md: no such file",
        "docs/figures/no.png: no such file",
        "docs/index.md#no-such: no such heading",
    ]
    assert broken("README.md", text) == wrong


@pytest.mark.parametrize("name", jxent.__all__)
def test_every_public_name_has_a_page_of_the_reference(name):
    assert f"::: jxent.{name}\n" in PAGES[f"docs/reference/{name}.md"]
    assert f"]({name}.md)" in PAGES["docs/reference/index.md"]
    assert f"reference/{name}.md\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_the_notebook_is_that_of_the_quickstart():
    made = (ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8")
    assert made == quickstart_notebook.notebook(), "run python tests/quickstart_notebook.py"


def test_prose_is_counted():
    long = " ".join(["word"] * 26) + ". "
    page = f"# Heading\n\n{long}Short: yes; no.\n\n```text\na; b; c\n```\n\n| a: b | c; d |\n"
    assert english.faults("docs/guides/page.md", page) == [
        "26 words a sentence at the 95th percentile, above 25",
        "2 colons and semicolons in 30 words, above 1",
        "no word to the reader (you)",
    ]
    assert english.faults("docs/theory/page.md", page.replace("word " * 3, "", 1)) == []
    assert english.faults("docs/guides/page.md", "# Heading\n\nYou read `a: b; c` [here](https://a.example/b).\n") == []
