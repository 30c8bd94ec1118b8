"The site: it is built without a fault, every page shows, names lead to their entries, and a fault stops the build."
import ast
import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fastcore.docments import docments

from ctbm import cohort, preprocess
from tests.browser import browser_page
from tests.conftest import ROOT

BUILDER = ROOT / ".ci" / "docs" / "build.py"
WIDE = "[document.documentElement.scrollWidth, innerWidth]"
EMPTY = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"


def build(root: Path, out: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, str(BUILDER), "--root", str(root), "--out", str(out)]
    return subprocess.run(words, capture_output=True, text=True)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site") / "_docs"
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def server(site):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_every_notebook_module_and_public_name_has_its_place(site):
    assert {p.stem for p in (ROOT / "nbs").glob("*.ipynb")} - {"index"} == {p.stem for p in (site / "nbs").glob("*.html")}
    for path in (ROOT / "ctbm").glob("[a-z]*.py"):
        text = (site / "api" / f"{path.stem}.html").read_text(encoding="utf8")
        body = ast.parse(path.read_text(encoding="utf8")).body
        names = next(ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
        missing = [name for name in names if f'id="ctbm.{path.stem}.{name}"' not in text]
        assert not missing, f"{path.name}: {missing}"


def test_parameters_are_those_of_docments(monkeypatch):
    monkeypatch.syspath_prepend(BUILDER.parent)
    from reference import Package
    modules = Package(ROOT / "ctbm").modules
    for function in (preprocess.rescale, preprocess.read_hu, cohort.join_labels, preprocess.Preprocess):
        entry = modules[function.__module__.split(".")[1]].public[function.__name__]
        theirs = {k: v or "" for k, v in docments(function).items() if k != "return"}
        assert {p.name: p.comment for p in entry.parameters if p.name != "*"} == theirs
        if entry.returns: assert entry.returns.comment == (docments(function)["return"] or "")


def test_every_page_in_a_browser(site, server):
    "On a telephone: no error, no missing picture, no request to elsewhere, nothing to scroll sideways."
    with browser_page(width=390, height=800) as page:
        asked, wrong = [], {}
        page.on("request", lambda request: asked.append(request.url))
        for path in sorted(site.rglob("*.html")):
            name = path.relative_to(site).as_posix()
            page.goto(f"{server}/{name}")
            (wide, window), empty = page.evaluate(WIDE), page.evaluate(EMPTY)
            if wide > window or empty or page.said: wrong[name] = (wide, empty, list(page.said))
            page.said.clear()
        assert not wrong, wrong
        assert not (elsewhere := {url for url in asked if not url.startswith((server, "data:"))}), elsewhere


def test_search_links_and_colours(site, server):
    with browser_page() as page:
        for address in (server, site.as_uri()):
            page.goto(f"{address}/search.html?q=skull_crop")
            page.locator("#search-results li a").first.wait_for()
            assert page.locator("#search-results li a[href*='preprocess']").count()
        page.goto(f"{server}/search.html?q=skull_mask")
        page.locator("#search-results li a[href$='#ctbm.preprocess.skull_mask']").first.wait_for()
        page.goto(f"{server}/nbs/02_preprocess.html")
        page.locator("p a code", has_text="skull_mask").or_(page.locator(".exported a", has_text="skull_mask")).first.click()
        assert page.url.endswith("api/preprocess.html#ctbm.preprocess.skull_mask")
        page.locator("dt[id='ctbm.preprocess.skull_mask'] .viewcode-link").click()
        assert page.url.endswith("_modules/ctbm/preprocess.html#skull_mask")
        shade = lambda: sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)")))
        light = shade()
        page.emulate_media(color_scheme="dark")
        assert shade() < 200 < 600 < light


def test_faults_stop_the_build(tmp_path):
    "A link, a picture, a page and a docstring that lead nowhere are all named."
    root = tmp_path / "tiny"
    for name in ("nbs", "ctbm"): (root / name).mkdir(parents=True)
    for name in ("settings.ini", "ctbm/brain.py", "nbs/02b_brain.ipynb"): shutil.copy(ROOT / name, root / name)
    (root / "README.md").write_text("# tiny\n\n[gone](nbs/99_gone.ipynb) ![none](nbs/images/none.png) `brain.nothing` [place](#nowhere)\n")
    source = (root / "ctbm" / "brain.py").read_text().replace('"""', '"""As `ctbm.gone.name` says. ', 1)
    (root / "ctbm" / "brain.py").write_text(source)
    done = build(root, tmp_path / "_docs")
    assert done.returncode == 1
    for fault in ("99_gone", "none.png", "brain.nothing", "ctbm.gone.name", "nowhere"): assert fault in done.stderr, fault
    notebook = json.loads((root / "nbs" / "02b_brain.ipynb").read_text())
    notebook["cells"][0]["source"] = ["no title"]
    (root / "nbs" / "02b_brain.ipynb").write_text(json.dumps(notebook))
    done = build(root, tmp_path / "_docs")
    assert done.returncode and "02b_brain.ipynb" in done.stderr
