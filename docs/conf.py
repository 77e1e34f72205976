"""The site: `make docs`."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import site_pages

HERE = Path(__file__).parent
project = "lensclust"
author = "the lensclust authors"
copyright = author
release = importlib.metadata.version("lensclust")
# myst_nb reads Markdown (as myst_parser does) and notebooks.
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"lensclust {release}"
exclude_patterns = ["_build"]
# Notebooks are shown with the outputs that `make notebooks` left in them.
nb_execution_mode = "off"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
# Examples of docstrings are copied without their prompts.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
# jaxtyping's shapes ("prompt d_model") are not types that could be linked to.
nitpicky = False
suppress_warnings = ["ref.python", "misc.highlighting_failure"]


def setup(app: object) -> None:
    """Write the pages that are made from the code, when a site is built."""
    site_pages.write_reference(HERE / "reference")
    site_pages.copy_notebooks(HERE / "notebooks")
