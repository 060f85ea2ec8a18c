"""Settings of the documentation site: `make docs` builds it, and any warning is an error."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))  # extensions of this site

from tva.version import __version__

project = "tva"
author = "The tva authors"
copyright = "2026, the tva authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_line",
    "mathml",
    "notebooks",
    "outside_links",
]
exclude_patterns = ["_build"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes of a dataclass are described once
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # Lightning's use its own roles
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
python_display_short_literal_types = True
python_use_unqualified_type_names = True
default_role = "py:obj"  # `name` in a docstring

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"tva {release}"
html_copy_source = False
html_show_sphinx = False
