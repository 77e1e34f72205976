"""The site: `make docs`."""

import importlib.metadata

project = "lensclust"
author = "the lensclust authors"
copyright = author
release = importlib.metadata.version("lensclust")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"lensclust {release}"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
# Examples of docstrings are copied without their prompts.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
# jaxtyping's shapes ("prompt d_model") are not types that could be linked to.
nitpicky = False
suppress_warnings = ["ref.python", "misc.highlighting_failure"]
