"""Finished edits, opened again: rebuild their pages from ``edit.json`` only, and put several side by side."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tva.checkpoints import atomic_path, check_export, fingerprint, open_weights, write_export
from tva.report.chart_files import Format, chart_files
from tva.report.edit_report import read_report, stamp
from tva.report.export import all_rows, to_csv, to_latex
from tva.report.page import comparison_page, differences, edit_page
from tva.report.run_files import EDIT_JSON, PAGE
from tva.vectors.content import as_written


@dataclass(frozen=True)
class Revisited:
    """Runs that were opened again.

    Attributes:
        contents: Their ``edit.json``, by name.
        notices: What is said at the top of each page, by name; of the comparison under ``""``.
        pages: The files written: pages, and tables and charts if asked for.
        skipped: Folders that hold no edit, such as those of fits.
    """

    contents: Mapping[str, Mapping[str, Any]]
    notices: Mapping[str, Sequence[str]]
    pages: Sequence[Path]
    skipped: Sequence[Path] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "runs": dict(self.contents),
            "notices": {name: list(said) for name, said in self.notices.items()},
            "pages": [str(page) for page in self.pages],
            "skipped": [str(path) for path in self.skipped],
        }


def revisit(
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    csv: str | os.PathLike[str] | None = None,
    latex: str | os.PathLike[str] | None = None,
    charts: str | os.PathLike[str] | None = None,
    format: Format = "png",
) -> Revisited:
    """Rebuild the page of every run, and with several put them side by side; export their numbers.

    Args:
        runs: Folders of finished edits, or their edit.json. Folders of fits among them are left out.
        output: The page that compares them; by default comparison.html. Of one run, where its page goes, by default
            beside its edit.json. A name that ends in .csv or .tex is a table instead, and no page is written.
        csv: Also write all numbers of the tasks as CSV.
        latex: Also write the table before and after as LaTeX.
        charts: Also draw every chart into this folder, one file each.
        format: Of these files: png, svg or pdf.

    Raises:
        FileNotFoundError: A run does not exist, or none is an edit.
        ValueError: A run holds no evaluations, or is given twice, or the output has another ending.
    """
    kind = Path(output).suffix.lower() if output is not None else ".html"
    if kind not in (".html", ".htm", ".csv", ".tex"):
        raise ValueError(f"--output must end in .html for a page, .csv or .tex for a table; found {str(output)!r}.")
    for option, path, ending in (("csv", csv, ".csv"), ("latex", latex, ".tex")):
        if path is not None and Path(path).suffix.lower() != ending:
            raise ValueError(f"--{option} must be a file that ends in {ending}; found {os.fspath(path)!r}.")
    if charts is not None and Path(charts).is_file():
        raise ValueError(f"--charts must be a folder, and {charts} is a file. Give another.")
    given = [Path(run) for run in runs]
    skipped = [path for path in given if _is_fit(path)]
    paths = [path for path in given if path not in skipped] or given
    contents = _read(paths)
    notices: dict[str, list[str]] = {name: changed_inputs(content) for name, content in contents.items()}
    tables = {csv: to_csv(all_rows(contents)), latex: to_latex(contents)}
    if kind in (".csv", ".tex"):
        tables[output] = to_csv(all_rows(contents)) if kind == ".csv" else to_latex(contents)
    exports: dict[Path, str | bytes] = {Path(path): text for path, text in tables.items() if path is not None}
    drawn_pages = {} if kind in (".csv", ".tex") else _pages(paths, contents, notices, output)
    if charts is not None:
        exports |= {Path(charts) / name: drawn for name, drawn in chart_files(contents, format)}
    for path, content in {**drawn_pages, **exports}.items():
        if not _is_page_of_run(path):
            check_export(path, content)
    pages = [_write(path, content) for path, content in {**drawn_pages, **exports}.items()]
    return Revisited(contents, notices, pages, [path for path in skipped if path not in paths])


def _is_fit(path: Path) -> bool:
    return path.is_dir() and not (path / EDIT_JSON).exists() and any(path.glob("**/*.ckpt"))


def _read(paths: Sequence[Path]) -> dict[str, Mapping[str, Any]]:
    read = {path: read_report(path) for path in paths}
    if len(read) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"A run is given twice: {twice}. Name each once.")
    empty = [path for path, content in read.items() if not content["evaluations"]]
    if empty:
        raise ValueError(
            f"{empty[0]} holds no evaluations, so there is nothing to draw. Make the edit again: "
            f"what its log holds is not evaluated again."
        )
    names = _names(paths)
    return {names[path]: content for path, content in read.items()}


def _pages(
    paths: Sequence[Path],
    contents: Mapping[str, Mapping[str, Any]],
    notices: dict[str, list[str]],
    output: str | os.PathLike[str] | None,
) -> dict[Path, str]:
    """Draw the page of each run, and of several the comparison, whose notices are added; by where they go."""
    names, pages = _names(paths), {}
    for path in paths:
        folder = path if path.is_dir() else path.parent
        page = Path(output) if output is not None and len(paths) == 1 else folder / PAGE
        try:
            pages[page] = edit_page(contents[names[path]], notices[names[path]])
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{path} is of another version of tva, whose reports this one cannot draw ({type(error).__name__}: "
                f"{error}). Make the edit again."
            ) from error
    if len(paths) > 1:
        said = [f"{name}: {notice}" for name, found in notices.items() for notice in found]
        page = Path("comparison.html" if output is None else output)
        pages[page] = comparison_page(contents, said)
        notices[""] = list(differences(contents))
    return pages


def _is_page_of_run(path: Path) -> bool:
    """Return whether a page is that of an edit in its folder, which an earlier version may have drawn."""
    return path.name == PAGE and (path.parent / EDIT_JSON).is_file()


def _write(path: Path, content: str | bytes) -> Path:
    if not _is_page_of_run(path):
        return write_export(path, content)
    assert isinstance(content, str)
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return path


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return for each run the shortest name that distinguishes it: its path without what all have in common.

    Example:
        >>> list(_names([Path("runs/demo/add/seed=0"), Path("runs/demo/forget/seed=0/edit.json")]).values())
        ['add/seed=0', 'forget/seed=0']
    """
    folders = {path: (path.parent if path.name == EDIT_JSON else path).absolute() for path in paths}
    common = Path(os.path.commonpath(folders.values()))
    return {
        path: str(folder.relative_to(common)) if folder != common else folder.name for path, folder in folders.items()
    }


def changed_inputs(content: Mapping[str, Any]) -> list[str]:
    """Return which inputs of an edit have changed since; files that are gone are not listed.

    Inputs of the same size and time are taken to be the same; the others are read again and compared by fingerprint.
    """
    return list(_changed(content))


def _changed(content: Mapping[str, Any]) -> Iterator[str]:
    inputs = {
        "the base": content["base"],
        **{f"the vector {name}": found for name, found in content["vectors"].items()},
    }
    for name, entry in inputs.items():
        path = entry["path"]
        if path is None or "modified_ns" not in entry or path.startswith("hf:") or not Path(path).expanduser().exists():
            continue
        if stamp(path) == {key: entry[key] for key in ("bytes", "modified_ns")}:
            continue
        if name == "the base":
            before, now = entry["fingerprint"], fingerprint(open_weights(path)).digest
        elif before := entry.get("content"):
            now = as_written(open_weights(path)).fingerprint().digest
        else:
            yield f"The checkpoint of {name}, {path}, has been written again since this edit."
            continue
        if before != now:
            yield f"{name.capitalize()} has changed since this edit: {path} is now {now}, and was {before}."
