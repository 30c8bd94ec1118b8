"The site: every notebook with its outputs, an API page for each module, the README as home. Fails on the first thing that is not right."
import argparse
import io
import os
import re
import shutil
import sys
from configparser import ConfigParser
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import notebooks
from links import broken
from reference import Entry, Package, Parameter, package
from sphinx.application import Sphinx

HERE = Path(__file__).parent
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "data/README.md")
GROUPS = (  # first two digits of a notebook's name, title and line of the group that starts there
    ("00", "Cohorts", "From files to a table; synthetic cohorts; a look before anything is trained."),
    ("02", "Preprocessing", "From DICOM to the numbers a network sees, once."),
    ("03", "Datasets", "Splits that keep patients whole, audits, batches."),
    ("04", "Learning", "Networks, losses, recipes, and the training job itself."),
    ("06", "Decisions", "Thresholds, probabilities, and what a decision is worth."),
    ("07", "Evaluation", "Figures with intervals, errors, reports."),
    ("08", "New scans", "Saliency, prediction, export, DICOM."),
    ("10", "Pipelines", "Three recipes told from scan to answer."),
    ("19", "At work", "The command line, the recipes side by side, your own data."),
)


@dataclass(frozen=True)
class Site:
    root: Path  # of the repository
    work: Path  # for `pages`, which Sphinx reads, and `html`, which it writes

    @property
    def stage(self) -> Path: return self.work / "pages"

    @property
    def out(self) -> Path: return self.work / "html"

    @cached_property
    def package(self) -> Package:
        return package(self.root / "ctbm")

    @cached_property
    def settings(self) -> dict[str, str]:
        parser = ConfigParser()
        parser.read(self.root / "settings.ini", encoding="utf8")
        return dict(parser["DEFAULT"])

    @cached_property
    def notebooks(self) -> list[Path]:
        return [p for p in sorted((self.root / "nbs").glob("*.ipynb")) if p.stem != "index"]

    @cached_property
    def homes(self) -> dict[str, Path]:
        "The notebook that exports each module."
        return {module: path for path in self.notebooks if (module := notebooks.module_of(path))}

    def write(self, name: str, text: str) -> None:
        path = self.stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf8")

    def read(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf8")

    @cached_property
    def pages(self) -> list[str]:
        return [name for name in PAGES if (self.root / name).is_file()]

    def linked(self, text: str, folder: str = "") -> str:
        "Links between files of the repository as links of the site, or to the repository where a file has no page."
        settings = self.settings
        address = f"https://github.com/{settings['user']}/{settings['repo']}/blob/{settings['branch']}"
        def led(match):
            target, _, anchor = match[2].partition("#")
            if not target or re.match(r"\w+:", target): return match[0]
            path = Path(os.path.normpath(self.root / folder / target))
            if path.suffix == ".html" and path.with_suffix(".ipynb").is_file(): path = path.with_suffix(".ipynb")
            name = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else target
            here = path in self.notebooks or name in PAGES or name == "README.md" or name.startswith("nbs/images/")
            if path.exists() and not here: return f"{match[1]}{address}/{name}{match[3]}"
            name = "index.md" if name == "README.md" else name
            return f"{match[1]}{os.path.relpath(name, folder or '.')}{'#' * bool(anchor)}{anchor}{match[3]}"
        return LINK.sub(led, text)

    def staged(self) -> None:
        "Everything Sphinx reads, in the layout of the repository."
        shutil.rmtree(self.work, ignore_errors=True)
        self.stage.mkdir(parents=True)
        if (self.root / "nbs/images").is_dir(): shutil.copytree(self.root / "nbs/images", self.stage / "nbs/images")
        for path in self.notebooks:
            notebooks.write_page(path, self.stage / "nbs" / path.name, self.package, lambda text: self.linked(text, "nbs"))
        for name in self.pages: self.write(name, self.linked(self.read(name), str(Path(name).parent)))
        self.write("index.md", self.linked(re.sub(r"^<!--.*?-->\s*", "", self.read("README.md"), flags=re.DOTALL)) + self.contents())
        for module in self.package.modules: self.write(f"api/{module}.md", api_page(self, module))
        self.write("api/index.md", api_index(self))

    def contents(self) -> str:
        "The sidebar; the pages of the groups are written on the way."
        starts = [start for start, *_ in GROUPS]
        member = lambda path: max((s for s in starts if s <= path.stem[:2]), default=starts[0])
        lists = []
        for start, name, line in GROUPS:
            if not (inside := [p for p in self.notebooks if member(p) == start]): continue
            slug = "guide/" + name.lower().replace(" ", "_")
            rows = "\n".join(f"| [{p.stem}](../nbs/{p.name}) | {cell(notebooks.title(p)[1])} |" for p in inside)
            text = f"# {name}\n\n{line}\n\n| notebook | what it is about |\n|---|---|\n{rows}\n\n"
            self.write(f"{slug}.md", text + toctree("", [f"../nbs/{p.stem}" for p in inside]))
            lists.append(slug)
        others = [name.removesuffix(".md").replace("data/README", "A data folder <data/README>") for name in self.pages]
        return "\n\n" + toctree("Notebooks", lists) + toctree("Reference", ["api/index"]) + toctree("Project", others)

    def built(self) -> list[str]:
        "Sphinx's warnings, each of which is an error here, then what its pages get wrong."
        said = io.StringIO()
        os.environ["CTBM_DOCS"] = str(self.root)
        version = self.settings["version"]
        with redirect_stdout(io.StringIO()):
            app = Sphinx(self.stage, HERE, self.out, self.stage / ".doctrees", "html", warning=said, status=None, freshenv=True,
                         parallel=os.cpu_count() or 1, confoverrides={"version": version, "release": version})
            app.build(force_all=True)
        plain = re.sub(r"\x1b\[[\d;]*m", "", said.getvalue()).replace(f"{self.stage}/", "")
        absent = [f"{name}: no page" for name in sorted(app.env.found_docs) if not (self.out / f"{name}.html").is_file()]
        return [line for line in plain.splitlines() if line.strip()] + absent + broken(self.out)


def toctree(caption: str, names: list[str]) -> str:
    head = f":caption: {caption}\n" if caption else ""
    return "```{toctree}\n:hidden:\n" + head + "\n" + "\n".join(names) + "\n```\n\n"


def cell(text: str) -> str:
    "Text in a cell of a Markdown table."
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: str) -> str:
    return f"`{cell(text)}`" if text else ""


def table(parameters: list[Parameter], returns: Parameter | None, head: str) -> str:
    "What can be given, and what comes back; nothing, where the signature says as much."
    told = any(p.annotation or p.comment for p in parameters) or returns and (returns.comment or returns.annotation != "None")
    if not told: return ""
    row = lambda p, name: f"| {name} | {code(p.annotation)} | {code(p.default)} | {cell(p.comment)} |"
    rows = [row(p, f"`{p.name}`" if p.name.startswith("*") else f"**{p.name}**") for p in parameters if p.name != "*"]
    if returns and returns.annotation != "None": rows.append(row(returns, "*returns*"))
    return "\n".join([f"| {head} | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n" if rows else ""


def entry_text(
    entry: Entry,
    fence: str = "::::",
    home: str = "",  # notebook that defines it, where that is to be linked
) -> str:
    "One entry as a directive of Sphinx's Python domain."
    place = f" ([{home}](#{entry.place}))" if home and entry.kind != "data" else ""
    lines = [f"{fence}{{py:{entry.kind}}} {entry.name}{entry.signature if entry.kind not in ('data', 'property') else ''}"]
    if entry.kind == "property" and entry.signature: lines.append(f":type: {entry.signature}")
    lines += ["", entry.doc + place, ""]
    if entry.kind == "data": lines += ["```python", f"{entry.name} = {entry.signature}", "```"]
    if entry.bases: lines += ["Based on " + ", ".join(code(base) for base in entry.bases) + ".", ""]
    record = entry.kind == "class" and (not entry.bases or "NamedTuple" in entry.bases)
    if entry.kind != "property": lines.append(table(list(entry.parameters), entry.returns, "field" if record else "parameter"))
    lines += [entry_text(member, fence[:-1]) for member in entry.members]
    return "\n".join([*lines, fence, ""])


def api_page(site: Site, name: str) -> str:
    "What a module exports: a list, then each with its parameters, constants last."
    module, home = site.package.modules[name], site.homes.get(name)
    entries = [e for e in module.public.values() if e.kind != "data"]
    constants = [e for e in module.public.values() if e.kind == "data"]
    lines = [f"# ctbm.{name}", "", f"```{{py:module}} ctbm.{name}", "```", "", module.doc, ""]
    if home: lines += [f"The notebook [{home.stem}](../nbs/{home.name}) tells how it works and shows it working.", ""]
    rows = (f"| {{py:obj}}`{e.name} <{e.full}>` | {cell(e.doc)} |" for e in entries)
    if entries: lines += ["| name | what it is |", "|---|---|", *rows, ""]
    told = lambda e: entry_text(e, home=home.stem if home else "") + "\n"
    if entries: lines += ["## Functions and classes", "", *map(told, entries)]
    if constants: lines += ["## Constants", "", *map(told, constants)]
    return "\n".join(lines)


def api_index(site: Site) -> str:
    modules = site.package.modules
    rows = [f"| {{py:mod}}`ctbm.{name}` | {cell(modules[name].doc)} |" for name in sorted(modules)]
    return "\n".join(["# The modules", "", "Every public name, with its parameters, its source, and the notebook that it comes from.", "",
                      "| module | what it is about |", "|---|---|", *rows, "", toctree("", sorted(modules))])


def build(
    root: Path,  # of the repository
    out: Path,  # where the site goes once it is whole; what is there is replaced, as is `_proc` beside it
) -> list[str]:  # what is wrong with it; empty if nothing is
    "Make the site."
    site = Site(root.resolve(), out.resolve().with_name("_proc"))
    site.staged()
    if wrong := site.built(): return wrong
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(site.out, out)
    return []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="the repository")
    parser.add_argument("--out", type=Path, help="where the site goes; _docs in the repository unless given")
    asked = parser.parse_args()
    out = asked.out or asked.root / "_docs"
    wrong = build(asked.root, out)
    print(*wrong, sep="\n", file=sys.stderr)
    print(f"{len(wrong)} faults" if wrong else f"the site: {out}/index.html")
    sys.exit(bool(wrong))
