"""Links from a page to files of the repository that are no pages: kept for files, plain text for folders.

Pages link relatively, so that they work where the repository is browsed. On the site a linked file is a download, and
CONTRIBUTING.md and CHANGELOG.md are pages.
"""

import os
import re
from pathlib import Path

PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
LINK = re.compile(r"\[([^\]\n]+)\]\(((?:\.\./)+[^)\s#]*)(#[^)\s]*)?\)")
ROOT_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")


def rewrite(app, docname, source):
    """Rewrite the links of one page."""
    folder = Path(app.srcdir, docname).parent
    if docname in ("contributing", "changelog"):
        source[0] = ROOT_LINK.sub(
            lambda match: f"](../{match[1]})", (Path(app.srcdir).parent / f"{docname.upper()}.md").read_text()
        )
        app.env.note_dependency(str(Path(app.srcdir).parent / f"{docname.upper()}.md"))

    def link(match):
        label, target, anchor = match.groups()
        path = Path(os.path.normpath(folder / target))
        if path.is_relative_to(app.srcdir):
            return f"[{label}]({os.path.relpath(path, folder)}{anchor or ''})"
        if path.name in PAGES:
            return f"[{label}]({os.path.relpath(Path(app.srcdir, PAGES[path.name]), folder)}{anchor or ''})"
        return label if path.is_dir() else match[0]

    source[0] = LINK.sub(link, source[0])


def setup(app):
    """Register the hook."""
    app.connect("source-read", rewrite)
    return {"parallel_read_safe": True}
