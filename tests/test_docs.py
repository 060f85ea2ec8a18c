"""The site builds without a warning; its links lead somewhere."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_site_builds_without_a_warning():
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", "docs/_build/html"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    index = (ROOT / "docs/_build/html/searchindex.js").read_text()
    assert "TaskVectorCallback".lower() in index.lower()
    page = (ROOT / "docs/_build/html/reference/commands/compose.html").read_text()
    assert "--max_memory" in page
    assert '<script src="https:' not in page
