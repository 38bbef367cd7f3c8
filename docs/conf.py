"""How Sphinx builds the site: `make docs`."""

import os

from captum_cage import __version__

project = "captum_cage"
author = "captum_cage contributors"
project_copyright = "captum_cage contributors"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "examples/**"]
# Pages that stand on their own and are downloaded from the gallery.
html_extra_path: list[str] = []

# Markdown, and notebooks that are run when the site is built.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_merge_streams = True
# Without ipywidgets tqdm warns at its import; no page draws a bar.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

# The reference, from docstrings in Google form.
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
napoleon_custom_sections = [("Source", "notes_style")]
napoleon_numpy_docstring = False
napoleon_use_rtype = False

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "alpha"
bibtex_reference_style = "author_year"

html_theme = "pydata_sphinx_theme"
html_title = "captum_cage"
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
}
# What is typed at a prompt, without the prompt.
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
