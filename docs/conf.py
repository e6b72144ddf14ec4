"""How `python -m sphinx -W --keep-going -b html docs build/docs` builds the documentation."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from fxpath.version import __version__  # noqa: E402

project = "fxpath"
author = "the fxpath developers"
project_copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "extension.operations",
    "extension.pictures",
]
root_doc = "index"
exclude_patterns: list[str] = []

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# -- docstrings ------------------------------------------------------------------------------------

# Every name that a docstring or a signature refers to has to be found.
nitpicky = True
nitpick_ignore_regex = [
    # Other projects' names: their inventories would have to be fetched.
    (r"py:.*", r"(torch|collections|pathlib|os|typing|networkx|pandas|matplotlib)\..*"),
    (r"py:.*", r"(lightning|transformers|torch_pruning)\..*"),
]
nitpick_ignore = [
    # A type variable, which says that a decorator returns what it is given.
    ("py:class", "fxpath.rules.own.Composition"),
    # matplotlib's and Lightning's, imported where types are checked alone.
    ("py:class", "Axes"),
    ("py:class", "LightningModule"),
    ("py:class", "Trainer"),
]
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
# Long unions are named as in the code, each with an entry in reference/words.md.
autodoc_type_aliases = {
    "Shapes": "fxpath.model.Shapes",
    "Inputs": "fxpath.model.given.Inputs",
    "Outputs": "fxpath.model.given.Outputs",
    "Criterion": "fxpath.pruning.criterion.Criterion",
    "Pass": "fxpath.passes.setting.Pass",
}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False

# -- HTML ------------------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = "fxpath"
html_static_path = ["_static"]
html_css_files = ["fxpath.css"]
html_show_sourcelink = False
html_show_sphinx = False
# A page without pages below it has no use for the list of those.
html_sidebars = {name: [] for name in ("index", "ten_minutes", "operations", "what_it_is_not")}
html_theme_options = {
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}


def _signature(
    app: object, what: str, name: str, value: Any, options: object, said: str, returns: str
) -> tuple[str, str] | None:
    """Leave out how a class is constructed that a function of the package makes, and no user."""
    if what != "class" or said is None:
        return None
    private = any(parameter.startswith("_") for parameter in inspect.signature(value).parameters)
    made = " made by " in (value.__init__.__doc__ or "")
    return ("", "") if private or made else None


def setup(app: Any) -> None:
    """Connect what is above."""
    app.connect("autodoc-process-signature", _signature)
