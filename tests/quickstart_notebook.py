"""Makes docs/quickstart.ipynb of docs/quickstart.md: `python tests/quickstart_notebook.py`."""

import json
import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def notebook():
    """The text of the notebook: a cell of code for each fence of Python, and what is between them."""
    page = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    parts = re.split(r"^```python\n(.*?)^```\n", page, flags=re.MULTILINE | re.DOTALL)
    cells = []
    for i, part in enumerate(parts):
        cell = {"cell_type": "code" if i % 2 else "markdown", "metadata": {}, "source": part.strip().splitlines(True)}
        cells.append(cell | ({"execution_count": None, "outputs": []} if i % 2 else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (DOCS / "quickstart.ipynb").write_text(notebook(), encoding="utf-8")
