"Sphinx: how the site looks, what a name in backticks leads to, and what would otherwise ask a server elsewhere."
import os
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.search.en import SearchEnglish
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

HERE, ROOT = Path(__file__).parent, Path(os.environ["CTBM_DOCS"])
sys.path.insert(0, str(HERE))
from notebooks import module_of  # noqa: E402
from reference import Nothing, package  # noqa: E402

project, copyright, author = "ctbm", "The ctbm founders", "The ctbm founders"
extensions = ["myst_nb", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["nbs/images", ".doctrees"]
smartquotes = False
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88
viewcode_follow_imported_members = False
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["config.cache"]
copybutton_selector = "div.cell_input pre, div.highlight-sh pre, div.highlight-python pre"

html_theme = "furo"
html_title = "ctbm"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_favicon = "static/ctbm.svg"
html_copy_source = html_show_sourcelink = False
html_show_sphinx = False
html_math_renderer = "mathml"
pygments_style, pygments_dark_style = "xcode", "github-dark"
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#00598d", "color-brand-content": "#00659f", "color-brand-visited": "#00659f"},
    "dark_css_variables": {"color-brand-primary": "#6fc1ee", "color-brand-content": "#6fc1ee", "color-brand-visited": "#6fc1ee"},
}

PACKAGE = package(ROOT / "ctbm")
HOMES = {f"nbs/{path.stem}": module_of(path) for path in (ROOT / "nbs").glob("*.ipynb")}
NOTEBOOK = re.compile(r"(\d\d[a-z]?_\w+)(\.ipynb)?")
LOG = logging.getLogger(__name__)


class Names(SphinxTransform):
    "Names in backticks lead to what they name."
    default_priority = 400

    def apply(self, **_):
        doc = self.env.current_document.docname
        home = doc.removeprefix("api/") if doc.startswith("api/") else HOMES.get(doc, "")
        for node in list(self.document.findall(nodes.literal)):
            if isinstance(node.parent, nodes.reference | nodes.title | addnodes.pending_xref): continue
            text = node.astext()
            if (named := NOTEBOOK.fullmatch(text)) and f"nbs/{named[1]}" in HOMES:
                link = dict(reftype="doc", refdomain="std", reftarget=f"/nbs/{named[1]}")
            elif found := self.found(node, text, home):
                link = dict(reftype="mod" if found.count(".") == 1 else "obj", refdomain="py", reftarget=found)
            else: continue
            shown = node.deepcopy()
            node.replace_self(addnodes.pending_xref("", shown, refdoc=doc, refexplicit=True, refwarn=True, **link))

    @staticmethod
    def found(node, text: str, home: str) -> str | None:
        try: return PACKAGE.find(text, home)
        except Nothing as error: LOG.warning("%s", error, location=node)


class Search(SearchEnglish):
    "Words, and the parts of names: `skull` finds `skull_mask`."
    js_splitter_code = r"""
var splitQuery = query => query.split(/[^\p{Letter}\p{Number}\p{Emoji_Presentation}]+/gu).filter(term => term);
"""

    def split(self, input: str) -> list[str]:
        return re.findall(r"[^\W_]+", input)


def source_of(_, module: str):
    "A module's code and where its names are, without importing it."
    found = PACKAGE.modules.get(module.removeprefix("ctbm."))
    return (found.source, found.places) if found else None


def not_there(_, __, node, ___):
    "A reference to a name of ours that the API does not have."
    if node.get("refdomain") == "py" and node["reftarget"].startswith("ctbm."):
        LOG.warning("no entry for %s", node["reftarget"], location=node)


def inline_math(self, node):
    self.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def block_math(self, node):
    self.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def setup(app):
    app.add_transform(Names)
    app.add_search_language(Search)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("viewcode-find-source", source_of)
    app.connect("missing-reference", not_there)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
