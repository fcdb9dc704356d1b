"""Counts what can be counted of good English in README.md and docs/: `python tests/prose.py`.

At most 25 words a sentence at the 95th percentile, and 15 colons and semicolons in 1000 words, which `theory` and
`benchmarks` may exceed. Guides and recipes speak to the reader.
"""

import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORDS, COLONS = 25, 15  # of a sentence; in 1000 words


def prose(text):
    """The paragraphs, headings and items of lists, without code, tables, addresses and markup."""
    text = re.sub(r"^([ \t]*)(`{3,}).*?^\1\2[ \t]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^[ \t]*(\||:::|--8<--|===|!!!|\?\?\?|<|\[.+?\]: ).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)|\$\$.*?\$\$|\$[^$\n]+\$", "code", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)(\{[^}]*\})?|<[^>\n]+>|https?://\S+", r"\1", text)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.|#+) )|(?<=\n)(?=#)", text)
    return [" ".join(re.sub(r"^\s*(?:[-*+]|\d+\.|#+) ", "", block).split()) for block in blocks if block.strip()]


def faults(page, text):
    blocks = prose(text)
    sentences = [sentence for block in blocks for sentence in re.split(r"(?<=[.!?])[)*_\"]* +(?=[^a-z])", block)]
    lengths = sorted(filter(None, (len(re.findall(r"\S*\w\S*", sentence)) for sentence in sentences)))
    if not lengths:
        return []
    found, longest = [], lengths[math.ceil(0.95 * len(lengths)) - 1]
    if longest > WORDS:
        found.append(f"{longest} words a sentence at the 95th percentile, above {WORDS}")
    colons = sum(len(re.findall(r"[:;](?!\w)", block)) for block in blocks)
    allowed = math.ceil(COLONS * sum(lengths) / 1000)
    if colons > allowed and not page.startswith(("docs/theory/", "docs/benchmarks/")):
        found.append(f"{colons} colons and semicolons in {sum(lengths)} words, above {allowed}")
    addressed = re.search(r"\byou\b", " ".join(blocks), re.IGNORECASE)
    if page.startswith(("docs/guides/", "docs/recipes/")) and not addressed:
        found.append("no word to the reader (you)")
    return found


def main():
    wrong = 0
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        page = path.relative_to(ROOT).as_posix()
        found = faults(page, path.read_text(encoding="utf-8"))
        for fault in found:
            print(f"{page}: {fault}")
        wrong += len(found)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
