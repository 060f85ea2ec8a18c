"""Print the requirements of tva at their floors: what ``make test-oldest`` installs."""

import re
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def floors(text: str) -> list[str]:
    """Return every dependency of ``[project]``, not of its extras, pinned to the oldest version that is allowed.

    Example:
        >>> floors('dependencies = [\\n  "torch>=2.6,<3",  # why\\n  "a[b]>=1; python_version < \\'3.14\\'",\\n]\\n')
        ['torch==2.6', "a[b]==1; python_version < '3.14'"]
    """
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)
    found = re.findall(r'^\s+"([\w.-]+(?:\[\w+\])?)>=([\w.]+)[^";]*(;[^"]*)?"', listed[1], re.M)
    return [f"{name}=={version}{marker}" for name, version, marker in found]


if __name__ == "__main__":
    print("\n".join(floors(PYPROJECT.read_text(encoding="utf-8"))))
