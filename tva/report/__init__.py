"""One self-contained HTML page for an edit, or for several side by side, made from the contents of ``edit.json``."""

from tva.report.page import comparison_page, edit_page
from tva.report.series import formula, interval, number, points

PAGE = "report.html"  # what its file is called, in the folder of its edit

__all__ = ["PAGE", "comparison_page", "edit_page", "formula", "interval", "number", "points"]
