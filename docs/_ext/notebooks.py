"""Write every tutorial as a notebook too, in notebooks/ of the site: it runs in Jupyter and in Colab as it is."""

import json
import re
from pathlib import Path

INSTALL = "%pip install --quiet tva"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def to_notebook(text, version=""):
    """Return a page in Markdown as a notebook of format 4: its prose, and its blocks as cells that run.

    Args:
        text: The page.
        version: Of tva to install; by default the newest.

    Example:
        >>> page = "Text.\\n\\n```bash\\ntva data\\n```\\n\\n```yaml\\n# a.yaml\\nx: 1\\n```\\n"
        >>> ["".join(cell["source"]) for cell in to_notebook(page)["cells"]][1:]
        ['Text.', '%%bash\\ntva data', '%%writefile a.yaml\\n# a.yaml\\nx: 1']
    """
    cells = [_cell("code", INSTALL + (f"=={version}" if version else ""))]
    end = 0
    for block in BLOCK.finditer(text):
        cells.append(_cell("markdown", text[end : block.start()]))
        cells.append(_block(*block.groups()))
        end = block.end()
    cells.append(_cell("markdown", text[end:]))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": [cell for cell in cells if cell["source"]],
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 4,
    }


def _block(language, text):
    name = re.match(r"# ([\w/]+\.(?:yaml|py))\n", text)
    if name:
        return _cell("code", f"%%writefile {name[1]}\n{text}")
    if language == "python":
        return _cell("code", text)
    return _cell("code", f"%%bash\n{text}") if language == "bash" else _cell("markdown", f"```{language}\n{text}```")


def _cell(kind, text):
    lines = text.strip().splitlines(keepends=True)
    return {"cell_type": kind, "metadata": {}, "source": lines} | (
        {"outputs": [], "execution_count": None} if kind == "code" else {}
    )


def _is_tutorial(name):
    return name.startswith("tutorials/") and name != "tutorials/index"


def add_link(app, name, source):
    """Let a tutorial end with a link to its notebook."""
    if _is_tutorial(name):
        href = f"../notebooks/{name.partition('/')[2]}.ipynb"
        source[0] += f'\n\n<p><a href="{href}" download>This tutorial as a notebook</a>, for Jupyter or Colab.</p>\n'


def write_notebooks(app, failed):
    """Write the notebooks beside the pages."""
    if failed is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir) / "notebooks"
    folder.mkdir(exist_ok=True)
    for name in filter(_is_tutorial, app.env.found_docs):
        notebook = to_notebook(Path(app.env.doc2path(name)).read_text(encoding="utf-8"))
        file = folder / f"{name.partition('/')[2]}.ipynb"
        file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def setup(app):
    app.connect("source-read", add_link)
    app.connect("build-finished", write_notebooks)
    return {"parallel_read_safe": True}
