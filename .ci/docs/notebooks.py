"The notebooks as pages: nbdev's processors, with what Quarto would do done for Sphinx."
import ast
import re
from functools import cache
from pathlib import Path

from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.process import NBProcessor, Processor
from nbdev.processors import FilterDefaults, clean_magics, populate_language, rm_header_dash, strip_ansi, strip_hidden_metadata
from reference import Package

WIDGET = "application/vnd.jupyter.widget-view+json"
DEFAULT = re.compile(r"^#\| *default_exp +(\w+)", re.MULTILINE)
EXPORTS = {"export", "exports", "exporti"}


def title(path: Path) -> tuple[str, str]:
    "Title and subtitle of a notebook."
    first = next(c.source for c in read_nb(path).cells if c.cell_type == "markdown")
    found = re.match(r"# (.+)\n(?:\n> (.+))?", first + "\n")
    if not found: raise ValueError(f"{path.name} does not open with `# title` and `> subtitle`")
    return found[1], found[2] or ""


@cache
def module_of(path: Path) -> str:
    "The module that a notebook exports; empty where it exports none."
    found = [m[1] for c in read_nb(path).cells if c.cell_type == "code" and (m := DEFAULT.search(c.source))]
    return found[0] if found else ""


def bound(source: str) -> list[str]:
    "The names that a cell defines, imports left out."
    made = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef): made.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            made += [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return made


def folded(cell, label: str) -> None:
    "A cell whose code is shown when asked for."
    cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
    cell.metadata["mystnb"] = {"code_prompt_show": label, "code_prompt_hide": label}


def dropped(cell) -> None:
    "Cells that only nbdev needs, and what it was told to hide."
    if {"hide", "default_exp"} & set(cell.directives_) or cell.directives_.get("include:") == ["false"]: del cell["source"]
    elif "hide_output" in cell.directives_: cell.outputs = []
    elif "hide_input" in cell.directives_: cell.metadata["tags"] = ["remove-input"]


def without_widgets(cell) -> None:
    "A widget needs its kernel: what stands beside it is shown, and progress bars are not."
    if cell.cell_type != "code": return
    live = [o for o in cell.get("outputs", []) if WIDGET in o.get("data", {})]
    for output in live: del output["data"][WIDGET]
    cell.outputs = [o for o in cell.get("outputs", []) if not (o in live and set(o["data"]) <= {"text/plain"})]


def imports_folded(cell) -> None:
    if cell.cell_type != "code" or set(cell.directives_) & EXPORTS: return
    body = ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE)).body
    if body and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body): folded(cell, "Imports")


class Exported(Processor):
    "Exported code is folded, below a line for each public name that leads to its API entry."

    def begin(self):
        package, module = self.nb.pages_
        made, seen = [], set()
        for cell in self.nb.cells:
            if set(getattr(cell, "directives_", {})) & EXPORTS:
                names = bound(cell.source)
                entries = [e for n in names if (e := package.modules[module].public.get(n)) and e.kind != "data" and n not in seen]
                seen |= {e.name for e in entries}
                if entries: made.append(self.card(entries))
                folded(cell, self.label(cell, names, bool(entries)))
            made.append(cell)
        self.nb.cells = made

    @staticmethod
    def card(entries):
        anchors = "".join(f"({e.place})=\n" for e in entries)
        lines = "\n\n".join(f"{{py:obj}}`{e.name} <{e.full}>` {e.doc}" for e in entries)
        cell = mk_cell(f"{anchors}\n:::{{container}} exported\n{lines}\n:::\n", "markdown")
        cell.directives_ = {}
        return cell

    @staticmethod
    def label(cell, names: list[str], public: bool) -> str:
        if public: return "Source"
        if all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(cell.source).body): return "Imports"
        shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        return f"Source: {shown}" if names else "Source"


class Pages(FilterDefaults):
    "nbdev's processors without those that execute code or write Quarto's dialect."

    def base_procs(self):
        return [populate_language, strip_ansi, rm_header_dash, dropped, without_widgets, imports_folded, Exported, clean_magics,
                strip_hidden_metadata]

    def nb_proc(self, nb):
        return NBProcessor(nb=nb, procs=self.procs())


def write_page(
    source: Path,  # notebook
    target: Path,  # page
    package: Package,
    links,  # Markdown -> Markdown with links that hold on the site
) -> None:
    "One notebook as a page for Sphinx."
    nb = read_nb(source)
    nb.pages_ = (package, module_of(source))
    Pages()(nb)
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = links(cell.source)
    nb.metadata.pop("widgets", None)
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    del nb["pages_"]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, target)
