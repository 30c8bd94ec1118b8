"The house is in order: notebooks, package and README say the same, and the traps of nbdev are not sprung."
import ast
import json
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
HEADLESS = [f"{name}.ipynb" for name in ("01_eda", "05_train", "07a_report", "07h_regions", "20_compare", "30_your_own_data")]
PRIVATE = re.compile(r"/home/|/root/|/Users/|/tmp/|/private/|\.venv/")


def cells(path: Path, kind: str = "code") -> list[tuple[str, dict]]:
    return [("".join(cell["source"]), cell) for cell in json.loads(path.read_text(encoding="utf8"))["cells"] if cell["cell_type"] == kind]


def nbdev(command: str, folder: Path):
    done = subprocess.run([str(Path(sys.executable).parent / command)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "The notebooks in a folder of their own, without anything generated."
    folder = tmp_path_factory.mktemp("house") / "ctbm"
    (folder / "ctbm").mkdir(parents=True)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copy(ROOT / "ctbm" / "__init__.py", folder / "ctbm")
    return folder


def test_package_is_what_the_notebooks_export(copy):
    nbdev("nbdev_export", copy)
    fresh, kept = ({p.name: p.read_text(encoding="utf8") for p in (root / "ctbm").glob("*.py")} for root in (copy, ROOT))
    assert set(fresh) == set(kept), f"module without notebook, or the reverse: {set(fresh) ^ set(kept)}; run `make export`"
    assert not (stale := [name for name in kept if fresh[name] != kept[name]]), f"not what the notebooks export: {stale}; run `make export`"


def test_notebooks_are_clean(copy):
    nbdev("nbdev_clean", copy)
    dirty = [p.name for p in NOTEBOOKS if json.loads((copy / "nbs" / p.name).read_text()) != json.loads(p.read_text())]
    assert not dirty, f"run `nbdev_clean`: {dirty}"


def test_readme_is_the_index_notebook():
    spec = spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    spec.loader.exec_module(module := module_from_spec(spec))
    assert (ROOT / "README.md").read_text(encoding="utf8") == module.readme(), "run `make export`"


def test_no_two_notebooks_export_one_module():
    sources = [source for path in NOTEBOOKS for source, _ in cells(path)]
    exports = [module for source in sources for module in re.findall(r"^#\| *default_exp +(\S+)", source, re.MULTILINE)]
    assert len(exports) == len(set(exports)) and len(exports) >= 14


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_keeps_the_habits(path):
    raw = path.read_text(encoding="utf8")
    assert not re.search(r"^\s*\"?(<{7} |>{7} |={7}$)", raw, re.MULTILINE), "an unresolved merge conflict"
    assert "widgets" not in json.loads(raw)["metadata"], "the state of widgets is saved in it: remove it, pictures stand in for them"
    assert len(raw) < 1_000_000, f"{len(raw):,} bytes: saved outputs are too large"
    first = cells(path, "markdown")[0][0]
    assert re.match(r"# .+\n\n> .+", first), "opens with a title and a subtitle"
    for source, cell in cells(path):
        outputs = cell["outputs"]
        assert not [o for o in outputs if o["output_type"] == "error"], f"an error in a saved output: {source[:80]}"
        assert not [o for o in outputs if o.get("name") == "stderr"], f"warnings or progress bars in a saved output: {source[:80]}"
        shown = [(kind, value) for o in outputs for kind, value in o.get("data", {"text": o.get("text")}).items()]
        said = [value for kind, value in shown if not kind.startswith("image/")]
        assert not PRIVATE.search(str(said)), f"a path of somebody's machine in a saved output: {source[:80]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_imports_stand_alone(path):
    for source, _ in cells(path):
        code = re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)
        top = ast.parse(code).body
        importing = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in top]
        guard = [isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" or isinstance(node, ast.Try) and len(top) == 1
                 for node in top]  # types only; or the one that says what to do where ctbm is not installed
        alone = not any(importing) or all(i or g for i, g in zip(importing, guard, strict=True))
        assert alone, f"imports mixed with other code: {source[:80]}"
        assert not re.search(r"^from \S+ import \*", source, re.MULTILINE)


@pytest.mark.parametrize("name", HEADLESS)
def test_headless_notebooks_have_parameters_and_run_every_cell(name):
    every = cells(ROOT / "nbs" / name)
    tagged = [source for source, cell in every if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1, "one cell tagged parameters"
    assert not [source for source, _ in every if re.search(r"eval: *false|nbdev_export\(\)", source)], "papermill would run it"


def test_floors():
    "Files and pixels know nothing of torch; importing the package costs nothing; no module names a higher floor."
    light = "import ctbm.sources, ctbm.cohort, ctbm.preprocess, ctbm.phantom, ctbm.pack, ctbm.viewer, ctbm.cli"
    code = f"import sys, ctbm; assert 'numpy' not in sys.modules; {light}; assert 'torch' not in sys.modules"
    slow = "{'torch', 'monai', 'SimpleITK', 'matplotlib.pyplot'}"
    volumes = f"import ctbm.volumetric, ctbm.lesions, ctbm.seg; assert not {slow} & set(sys.modules)"
    road = "import ctbm.train, ctbm.contours; assert not {'monai', 'SimpleITK'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}; {volumes}; {road}"], check=True, cwd=ROOT)
    floors = [{"cohort", "brain", "preprocess", "phantom", "viewer", "sources", "lung", "windowed", "chest",
               "volumes", "progress"}, {"pack", "quality", "volumetric"},
              {"datasets", "models", "losses", "audit", "thresholds", "calibration", "decision", "evaluate", "failures", "page",
               "checklists", "checkpoints", "runs", "reference", "pooling", "bags", "texture", "curves", "siamese", "selection",
               "patches", "networks", "overlap", "lesions"},
              {"recipes", "jobs", "instruments", "learning", "choosing", "patient", "bundle"},
              {"train", "eda", "results", "report", "predict", "explain", "export", "dicom", "seg", "contours", "segment",
               "regions", "explorer"}, {"cli"}]
    seen, height = set(), {name: i for i, floor in enumerate(floors) for name in floor}
    for path in (ROOT / "ctbm").glob("[a-z]*.py"):
        imports = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        nodes = [n for n in imports if n.level or n.module.startswith("ctbm")]
        modules = [(n.module or "").removeprefix("ctbm").strip(".") for n in nodes]
        named = {name for n, module in zip(nodes, modules, strict=True) for name in ([module] if module else [a.name for a in n.names])}
        assert named <= set(height), f"{path.stem} names {named - set(height)}, which stands on no floor"
        seen |= named
        too_high = {name for name in named if height[name] > height[path.stem]}
        assert not too_high, f"{path.stem} names {too_high}"
    assert {"cohort", "preprocess", "train", "recipes"} <= seen
