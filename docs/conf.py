"""Configuration of the site. `sphinx-build -W docs build/docs` draws the pictures and builds it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))
os.environ.setdefault("KERAS_BACKEND", "torch")

import batchnorm  # noqa: E402

project = "batchnorm"
author = "The batchnorm authors"
copyright = "the batchnorm authors, Apache-2.0"
version = release = batchnorm.__version__

extensions = ["sphinx.ext.autodoc", "numpydoc", "myst_parser", "pictures"]
exclude_patterns = ["_pictures", "pictures", "_ext", "cpp", "Thumbs.db"]
default_role = "code"
highlight_language = "text"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "none"  # types stand in the docstrings' sections and in the signature
autodoc_member_order = "bysource"
python_display_short_literal_types = True
add_module_names = False
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
# A summary; every parameter, none that does not exist, each with its type; what is returned.
numpydoc_validation_checks = {"SS01", "PR01", "PR02", "PR04", "RT01"}
# Results and views that nobody builds: their fields are Attributes.
numpydoc_validation_exclude = {
    r"\.(TrainResult|Gradients|DoubleGradients|MeanVar|DatasetMoments|Applied|CacheInfo|Parameter)$",
    r"\.(Compared|Diagnosis|Finding)$",
    r"\.(LocalRank|Group)$",  # one of a LocalGroup; what others bring
    r"\.formats\.(Norm|Inspection|Folded|Pair|Format)$",
    r"\.torch\.(Sync)?BatchNorm",  # arguments are those of torch.nn
}

html_theme = "furo"
html_title = f"batchnorm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def short(app: Any, what: str, name: str, obj: object, options: Any, signature: Any, returns: Any) -> Any:
    """Signatures with names for types."""
    return signature and signature.replace("<class 'numpy.float32'>", "numpy.float32"), returns


def initials(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """A reference that begins with an initial, "S. Ioffe", is no list from S on."""
    lines[:] = [re.sub(r"^(\s*\.\. \[\S+\] )([A-Z]\.)", r"\1\\\2", line) for line in lines]


def listed(app: Any, docname: str, source: list[str]) -> None:
    """The table of decisions brings their pages into the sidebar."""
    if docname == "decisions/README":
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\nD*\n```\n"


def setup(app: Any) -> None:
    app.connect("source-read", listed)
    app.connect("autodoc-process-signature", short)
    app.connect("autodoc-process-docstring", initials, priority=900)  # after numpydoc
