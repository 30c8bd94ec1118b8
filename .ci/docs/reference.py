"What the package exports, read from its files without importing them: names, signatures, what each parameter means."
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

FILES = {  # ends of file names: `report.html` is no name of ours
    "json", "csv", "html", "png", "svg", "jpg", "ipynb", "py", "js", "pth", "parquet", "safetensors",
    "md", "zip", "dcm", "onnx", "yml", "yaml",
}
NAME = re.compile(r"(~?[A-Za-z_][\w.]*\w)(\(.*\))?", re.DOTALL)
LONGEST = 220  # characters of a constant's value that are shown; the source has the rest


@dataclass(frozen=True)
class Parameter:
    name: str  # with its stars
    annotation: str = ""
    default: str = ""
    comment: str = ""


@dataclass(frozen=True)
class Entry:
    "A public function, class, method or constant."
    module: str
    name: str  # with its class, where it is a method
    kind: str  # function, class, method, property or data
    doc: str
    signature: str = ""  # in brackets; of a constant its value
    parameters: tuple[Parameter, ...] = ()
    returns: Parameter | None = None
    bases: tuple[str, ...] = ()
    members: tuple["Entry", ...] = ()

    @property
    def full(self) -> str:
        return f"ctbm.{self.module}.{self.name}"

    @property
    def place(self) -> str:
        "Where its notebook has it: labels know no capitals."
        return f"{self.kind}-{self.module}-{self.name}"


class Nothing(ValueError):
    "A name that says it is ours and is not."


def comments(source: str) -> dict[int, str]:
    "The comment of each line that has one."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ").rstrip() for token in tokens if token.type == tokenize.COMMENT}


def unparsed(node: ast.AST | None) -> str:
    return "" if node is None else ast.unparse(node)


def arguments(of: ast.arguments, notes: dict[int, str]) -> Iterator[Parameter]:
    "Parameters in their order, `self` and `cls` left out."
    before = [*of.posonlyargs, *of.args]
    defaults = [None] * (len(before) - len(of.defaults)) + of.defaults
    def made(arg, default=None, star=""):
        return Parameter(star + arg.arg, unparsed(arg.annotation), unparsed(default), notes.get(arg.end_lineno, ""))
    yield from (made(*pair) for pair in zip(before, defaults, strict=True) if pair[0].arg not in ("self", "cls"))
    if of.vararg: yield made(of.vararg, star="*")
    elif of.kwonlyargs: yield Parameter("*")
    yield from (made(*pair) for pair in zip(of.kwonlyargs, of.kw_defaults, strict=True))
    if of.kwarg: yield made(of.kwarg, star="**")


def signature(parameters: tuple[Parameter, ...], returns: ast.AST | None = None) -> str:
    "Names and defaults; the types stand in the table below."
    words = [p.name + (f"={p.default}" if p.default else "") for p in parameters]
    return f"({', '.join(words)})" + (f" -> {unparsed(returns)}" if returns is not None else "")


class Qualified(ast.NodeTransformer):
    "Names that a module imports from another of ours, under their full name, so that the right one is linked."

    def __init__(self, imported: dict[str, str]):
        self.imported = imported

    def visit_Name(self, node):
        return ast.parse(self.imported[node.id], mode="eval").body if node.id in self.imported else node


def decorated(node: ast.AST, *names: str) -> bool:
    return any(unparsed(d).split("(")[0].split(".")[-1] in names for d in node.decorator_list)


class Module:
    "One file of the package."

    def __init__(self, path: Path):
        self.name, self.source = path.stem, path.read_text(encoding="utf8")
        self.lines = self.source.splitlines()
        self.tree, self.notes = ast.parse(self.source), comments(self.source)
        self.doc = ast.get_docstring(self.tree) or ""
        ours = [n for n in ast.walk(self.tree) if isinstance(n, ast.ImportFrom) and n.level and n.module]
        self.imported = {a.asname or a.name: f"ctbm.{n.module}.{a.name}" for n in ours for a in n.names}
        made = [e for node in self.tree.body for e in self.entries(node)]
        self.names = {name for node in ast.walk(self.tree) for name in self.bound(node)}
        self.defined = {entry.name: entry for entry in made}
        lists = [n.value for n in self.tree.body if isinstance(n, ast.Assign) and unparsed(n.targets[0]) == "__all__"]
        public = ast.literal_eval(lists[0]) if lists else []
        if missing := set(public) - set(self.defined):
            raise ValueError(f"{path.name}: __all__ names what the file does not define: {', '.join(sorted(missing))}")
        self.public = {name: self.defined[name] for name in public}

    @staticmethod
    def bound(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import | ast.ImportFrom): yield from ((a.asname or a.name) for a in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef): yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): yield node.id

    @cached_property
    def places(self) -> dict[str, tuple[str, int, int]]:
        "Kind, first and last line of everything that the file defines."
        found = {}
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{n.name}": ("def", n.lineno, n.end_lineno) for n in node.body if isinstance(n, ast.FunctionDef)}
            kind = "class" if isinstance(node, ast.ClassDef) else "def" if isinstance(node, ast.FunctionDef) else "other"
            found |= {entry.name: (kind, node.lineno, node.end_lineno) for entry in self.entries(node)}
        return found

    @cached_property
    def words(self) -> set[str]:
        "Names of parameters and fields, and strings that look like names: columns, keys and options."
        of = lambda entry: {p.name.strip("*") for p in entry.parameters}.union(*map(of, entry.members))
        given = {n.arg for n in ast.walk(self.tree) if isinstance(n, ast.arg | ast.keyword)}.union(*map(of, self.public.values()))
        values = {n.value for n in ast.walk(self.tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        return given | {v for v in values if v.isidentifier()} - set(self.public)

    def entries(self, node: ast.AST) -> Iterator[Entry]:
        if isinstance(node, ast.FunctionDef): yield self.function(node)
        elif isinstance(node, ast.ClassDef): yield self.class_(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = node.value.elts if len(names) > 1 and isinstance(node.value, ast.Tuple) else [node.value] * len(names)
                yield from (self.constant(n.id, v, node) for n, v in zip(names, values, strict=False) if isinstance(n, ast.Name))

    def constant(self, name: str, value: ast.AST, node: ast.AST) -> Entry:
        said = next((self.notes[line] for line in (node.lineno, node.end_lineno) if line in self.notes), "")
        if not said and (line := self.lines[node.lineno - 2]).startswith("# ") and not line.startswith("# %%"): said = line[2:]
        shown = unparsed(value)
        return Entry(self.name, name, "data", said, shown if len(shown) <= LONGEST else shown[:LONGEST].rsplit(",", 1)[0] + ", ...")

    def function(self, node: ast.FunctionDef, owner: str = "") -> Entry:
        kind = "function" if not owner else "property" if decorated(node, "property", "cached_property") else "method"
        given = tuple(arguments(node.args, self.notes))
        close = node.returns.end_lineno if node.returns else 0
        back = Parameter("returns", unparsed(node.returns), comment=self.notes.get(close, "")) if node.returns else None
        full = Qualified(self.imported).visit(deepcopy(node.returns)) if node.returns else None
        line = signature(given, full) if kind != "property" else unparsed(node.returns)
        return Entry(self.name, owner + node.name, kind, ast.get_docstring(node) or "", line, given, back)

    def class_(self, node: ast.ClassDef) -> Entry:
        bases = tuple(map(unparsed, node.bases))
        record = decorated(node, "dataclass") or "NamedTuple" in bases
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and not decorated(n, "setter")]
        start = next((self.function(n) for n in methods if n.name == "__init__"), None)
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)] if record else []
        given = tuple(Parameter(n.target.id, unparsed(n.annotation), unparsed(n.value), self.notes.get(n.end_lineno, "")) for n in fields)
        given = given or (start.parameters if start else ())
        told = [n for n in methods if ast.get_docstring(n) and (n.name[0] != "_" or n.name in ("__call__", "__getitem__"))]
        seen = [self.function(n, node.name + ".") for n in told]
        line = signature(given) if record or start else ""
        return Entry(self.name, node.name, "class", ast.get_docstring(node) or "", line, given, None, bases, tuple(seen))


@dataclass
class Package:
    "Every module, and what a name in backticks means."
    folder: Path
    modules: dict[str, Module] = field(default_factory=dict)

    def __post_init__(self):
        self.modules = {p.stem: Module(p) for p in sorted(self.folder.glob("[a-z]*.py"))}

    @cached_property
    def owners(self) -> dict[str, list[Entry]]:
        "Public names, with everything that is called so."
        found = {}
        for module in self.modules.values():
            for entry in module.public.values(): found.setdefault(entry.name, []).append(entry)
        return found

    @cached_property
    def words(self) -> set[str]:
        return set().union(*(m.words for m in self.modules.values()))

    def find(
        self,
        text: str,  # what stands in backticks
        home: str = "",  # module that the text is about
    ) -> str | None:  # full name of what the API documents, a module's `ctbm.x`; None: not ours
        "What a name means; a dotted one that names a module of ours and then nothing raises `Nothing`."
        if not (match := NAME.fullmatch(text.strip())): return None
        parts, call = match[1].removeprefix("~").split("."), bool(match[2])
        prefixed = parts[0] == "ctbm" and len(parts) > 1
        if prefixed: parts = parts[1:]
        if parts[0] in self.modules and (prefixed or len(parts) > 1): return self.dotted(parts, text, call)
        if prefixed: raise Nothing(f"`{text}`: ctbm has no module {parts[0]!r}")
        return self.bare(parts, home, call)

    def dotted(self, parts: list[str], text: str, call: bool) -> str | None:
        module = self.modules[parts[0]]
        if len(parts) == 1: return f"ctbm.{module.name}"
        if parts[1] in module.public: return self.member(module.public[parts[1]], parts[2:], text)
        if len(parts) == 2 and parts[1] in FILES and not call: return None
        if parts[1] in module.names: return None
        raise Nothing(f"`{text}`: ctbm.{module.name} has no {parts[1]!r}")

    def member(self, entry: Entry, rest: list[str], text: str) -> str:
        "A class's own member, or the class, where the member is a field or inherited."
        if not rest or entry.kind != "class": return entry.full
        if found := next((m.full for m in entry.members if m.name == f"{entry.name}.{rest[0]}"), None): return found
        known = {p.name for p in entry.parameters}
        if not entry.bases and rest[0] not in known and not re.search(rf"\b(self\.|def ){rest[0]}\b", self.modules[entry.module].source):
            raise Nothing(f"`{text}`: {entry.full} has no {rest[0]!r}")
        return entry.full

    def bare(self, parts: list[str], home: str, call: bool) -> str | None:
        "A name without its module: of the module that the text is about, or one that only one module has and nothing else is called."
        name, here = parts[0], self.modules.get(home)
        if here and name in here.public and (call or name not in here.words): return self.member(here.public[name], parts[1:], name)
        found = self.owners.get(name, [])
        telling = call or ("_" in name or name[:1].isupper()) and name not in self.words
        return self.member(found[0], parts[1:], name) if len(found) == 1 and telling and len(name) > 2 else None


@cache
def package(
    folder: Path,  # of its modules
) -> Package:
    "A package, read once."
    return Package(folder)
