"""Write a page for every command of ``tva``, from its parser, before the pages are read."""

import importlib
import os
import re
from pathlib import Path

from tva.cli.main import help_line, list_commands
from tva.cli.run_function import make_parser
from tva.cli.shipped_help import describe, shipped

TYPE = re.compile(r"\s*\(((?:required, )?type: .*)\)$")


def page(name, described):
    """Return the page of a command as Markdown."""
    lines = [f"# `tva {name}`", "", described["description"], "", "```text", described["usage"], "```", ""]
    for title, options in described["groups"]:
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        for option, explanation in options:
            kind = TYPE.search(explanation)
            text = TYPE.sub("", explanation).replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")
            lines += [f"`{option}`", f": {text or 'No description.'}"]
            lines += ["", f"  *{kind[1]}*".replace("_", r"\_"), ""] if kind else [""]
    return "\n".join(lines)


def write_pages(app):
    """Write ``reference/commands/``: a page a command, and their table of contents."""
    os.environ["COLUMNS"] = "100000"
    folder = Path(app.srcdir) / "reference/commands"
    folder.mkdir(exist_ok=True)
    commands, trainers = list_commands(), shipped()
    pages = {}
    for name, module in commands.items():
        if name in trainers:
            described = trainers[name]
        else:
            described = describe(make_parser(name, importlib.import_module(module)).format_help().replace("\b", ""))
        pages[f"{name.replace(' ', '-')}.md"] = page(name, described)
    rows = [
        f"| [`tva {name}`]({name.replace(' ', '-')}.md) | {help_line(module)} |" for name, module in commands.items()
    ]
    toc = ["```{toctree}", ":hidden:", *(name.removesuffix(".md") for name in pages), "```"]
    intro = (folder.parent / "command-line.txt").read_text()
    pages["index.md"] = "\n".join([intro, "| command | does |", "|---|---|", *rows, "", *toc, ""])
    for name, text in pages.items():
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def setup(app):
    """Register the hook."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}
