"""The notebook of each tutorial: the page's text and blocks, in order, as cells that a kernel takes."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted(path for path in (ROOT / "docs/tutorials").glob("*.md") if path.stem != "index")


@pytest.fixture(scope="module")
def to_notebook():
    sys.path.insert(0, str(ROOT / "docs/_ext"))
    try:
        import notebooks

        yield notebooks.to_notebook
    finally:
        sys.path.remove(str(ROOT / "docs/_ext"))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_becomes_a_notebook_that_installs_tva_and_has_every_block(page, to_notebook):
    nbformat = pytest.importorskip("nbformat")
    text = page.read_text()
    notebook = nbformat.reads(json.dumps(to_notebook(text)), as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source == "%pip install --quiet tva"
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"][1:]
    blocks = re.findall(r"^```(?:python|bash|yaml)\n(.*?)^```$", text, re.M | re.S)
    assert code
    for cell in code:
        plain = re.sub(r"^%%(bash|writefile \S+)\n", "", cell)
        assert any(plain == block.strip() for block in blocks)
        if not cell.startswith("%%"):
            compile(cell, page.name, "exec")
    prose = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert prose.startswith(text.split("\n", 1)[0])
