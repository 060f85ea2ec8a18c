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


@pytest.mark.slow
def test_a_tutorials_notebook_runs_and_displays_what_it_makes(to_notebook, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    text = (ROOT / "docs/tutorials/your-method.md").read_text()
    use = """import torch
from tva import TaskVector
from tva.compose import Recipe
vectors = {name: TaskVector({"w": torch.tensor([float(n), 1.0])}) for n, name in enumerate("abc")}
Recipe("__main__.Median(a, b, c)", vectors).evaluate(vectors)"""
    notebook = nbformat.reads(json.dumps(to_notebook(f"{text}\n```python\n{use}\n```\n")), as_version=4)
    del notebook.cells[0]  # which installs tva
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (shown,) = notebook.cells[-1].outputs
    assert "1.414" in re.sub(r"<style.*?</style>", "", shown.data["text/html"], flags=re.DOTALL)  # its norm
