"""How Sphinx builds the site: `make docs`."""

import os
import sys
from pathlib import Path

from sphinx.domains.python import PyObject

from captum_cage import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "captum_cage"
author = "captum_cage contributors"
project_copyright = "captum_cage contributors"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "annotations",
    "command_line",
    "mathml",
    "source_pages",
    "standalone",
    "type_aliases",
]
exclude_patterns = ["_build", "_ext", "examples/**"]

# Markdown, and notebooks that are run when the site is built.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_merge_streams = True
# Cells are run in other processes. The bars of tqdm need no widgets here.
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")

# The reference, from docstrings in Google form.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 72
toc_object_entries_show_parents = "hide"
napoleon_custom_sections = [("Source", "notes_style")]
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
nitpicky = True

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "alpha"
bibtex_reference_style = "label"

html_math_renderer = "mathml"
html_sidebars = {"start": [], "gallery/README": []}
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme = "pydata_sphinx_theme"
html_title = "captum_cage"
html_theme_options = {
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "navbar_align": "left",
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
}
# What is typed at a prompt, without the prompt.
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
# Other packages' names, words that docstrings have among types, and what is not public.
nitpick_ignore_regex = [
    (
        "py:class",
        r"(captum|hypothesis|matplotlib|networkx|np|numpy|pytest|scipy|tokenizers|torch)\..*",
    ),
    ("py:class", r"(collections|filelock|io|os|pathlib|re|transformers|typing)\..*"),
    (
        "py:class",
        r"ArrayLike|InterpretableInput|NDArray|PathLike|Tensor|csr_array|nn\..*",
    ),
    ("py:class", r"optional"),
    (
        "py:class",
        r"(captum_cage\..*\.)?_\w+|captum_cage\._captum\.LLMAttributionObject",
    ),
    ("py:class", r"(captum_cage\..*\.)?(Contrast|Factory|FollowUp|Result|Samples)"),
    ("py:class", r"captum_cage\.causal\.Prefix|captum_cage\.testing\.report\.Verdict"),
    ("py:class", r"(npt|st)\..*|SearchStrategy|RemoteLLMProvider"),
    (
        "py:class",
        r"captum_cage\.batch\.(worker\.(Cage|Job)|examples\.Examples|local\.Pool)",
    ),
    (
        "py:class",
        r"captum_cage\.(spool\.(SpooledRows|StoredRow)|streamed\.RowReader)",
    ),
]


# What Sphinx calls the variables of a class, docstrings call its attributes.
for field in PyObject.doc_field_types:
    if field.name == "variable":
        field.label = "Attributes"
