"The viewer where a person watches, where nobody does, under the laws of its window, and in a browser."

import json
import subprocess
import sys
from base64 import b64decode, b64encode
from io import BytesIO

import nbformat
import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel
from matplotlib import pyplot as plt
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from PIL import Image

from ctbm import viewer
from ctbm.preprocess import WINDOWS
from tests.browser import browser_page

WIDGET = "application/vnd.jupyter.widget-view+json"
PNG = b"\x89PNG\r\n\x1a\n"
SHOW = """
import numpy as np
from ctbm import viewer
volume = np.random.default_rng(0).normal(40, 20, (5, 32, 24))
viewer.view(volume, titles=list("abcde"))
"""
HOLD = "made = []; real = viewer.sliders; viewer.sliders = lambda *a, **k: made.append(real(*a, **k)) or made[-1]"
SLIDE = """
viewer.interactive(lambda level: viewer.slice_figure(volume[0], level, 80, ""), level=(0, 80, 1, 40))
picture, level, _ = made[0].children
before = picture.value
level.value = 50
print(picture.value != before, bytes(picture.value[1:4]))
"""


@pytest.fixture(autouse=True, scope="module")
def agg():
    plt.switch_backend("agg")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    "A kernel as JupyterLab talks to it."
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path_factory.mktemp("kernel")))
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def outputs(client, code, allow_stdin):
    "What a cell sends back for display."
    got = []
    reply = client.execute_interactive(code, allow_stdin=allow_stdin, timeout=60, output_hook=got.append)
    assert reply["content"]["status"] == "ok", reply["content"]
    return [m["content"] for m in got if m["msg_type"] in ("display_data", "execute_result", "stream", "error")]


@pytest.fixture(scope="module")
def notebook():
    "A notebook as papermill and nbconvert run it."
    return NotebookClient(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SHOW)]), timeout=60, kernel_name="python3").execute()


def test_live_front_end_gets_picture_and_sliders(kernel):
    style, picture, widget = outputs(kernel, SHOW, allow_stdin=True)
    assert "ctbm-style" in style["data"]["text/html"]
    assert set(picture["data"]) == {"image/png", "text/plain"} and b64decode(picture["data"]["image/png"]).startswith(PNG)
    assert set(widget["data"]) == {WIDGET, "text/plain"} and widget["data"][WIDGET]["model_id"]


def test_slider_in_the_kernel_changes_the_picture(kernel):
    outputs(kernel, SHOW, allow_stdin=True)
    outputs(kernel, HOLD, allow_stdin=True)
    *_, said = outputs(kernel, SLIDE, allow_stdin=True)
    assert said["text"] == "True b'PNG'\n"


def test_nobody_watching_gets_one_picture(notebook):
    (output,) = notebook.cells[0].outputs
    assert set(output["data"]) == {"image/png", "text/plain"} and b64decode(output["data"]["image/png"]).startswith(PNG)
    assert output["metadata"]["image/png"]["alt"] == "slice 3 of 5, level 40, width 80"
    assert "widgets" not in notebook.metadata


def test_html_page_holds_the_picture_and_loads_no_widget(notebook):
    page = HTMLExporter().from_notebook_node(notebook)[0]
    assert notebook.cells[0].outputs[0]["data"]["image/png"][:200] in page and "html-manager" not in page


def test_saved_from_a_live_session_the_picture_stays(kernel):
    "Outside JupyterLab the widget falls back to a line of text, and the picture above it stays."
    live = outputs(kernel, SHOW, allow_stdin=True)
    shown = [nbformat.v4.new_output("display_data", data=o["data"], metadata=o["metadata"]) for o in live]
    saved = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SHOW, outputs=shown)])
    page = HTMLExporter().from_notebook_node(saved)[0]
    assert shown[1]["data"]["image/png"][:200] in page and "Run this cell again to have it live." in page and "html-manager" not in page


def test_papermill_output_holds_the_picture(tmp_path):
    papermill = pytest.importorskip("papermill")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SHOW)]), tmp_path / "in.ipynb")
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False)
    (output,) = json.loads((tmp_path / "out.ipynb").read_text())["cells"][0]["outputs"]
    assert "image/png" in output["data"] and WIDGET not in output["data"]


def test_moving_a_slider_redraws_and_leaks_no_figure():
    def draw(threshold, n):
        figure, ax = plt.subplots(figsize=(1, 1))
        ax.axvline(threshold + n)
        return figure

    picture, threshold, n, _ = viewer.sliders(draw, threshold=(0.0, 1.0, 0.25, 0.5), n=(0, 3, 1, 1)).children
    pictures = [bytes(picture.value)]
    threshold.value = 0.75
    pictures.append(bytes(picture.value))
    n.value = 3
    pictures.append(bytes(picture.value))
    assert len(set(pictures)) == 3 and all(p.startswith(PNG) for p in pictures) and not plt.get_fignums()
    assert type(n.value) is int and threshold.readout_format == ".2f"


@pytest.mark.parametrize("control", [(0, 1, 0.1), (0, 1, 0.1, 2), (1, 0, 0.1, 0.5), (0, 1, 0, 0.5)])
def test_impossible_control_is_named(control):
    with pytest.raises(ValueError, match="threshold"): viewer.interactive(lambda threshold: None, threshold=control)


def test_view_starts_at_the_middle_slice(monkeypatch):
    asked = []
    monkeypatch.setattr(viewer, "show_live", lambda live, picture, alt: asked.append((live, picture[:8], alt)))
    viewer.view([np.zeros((4, 4))] * 6, level=-600, width=4000)
    viewer.view([np.zeros((4, 4))] * 6, start=5)
    assert asked == [(None, PNG, "slice 3 of 6, level -600, width 4000"), (None, PNG, "slice 6 of 6, level 40, width 80")]


def test_slices_of_different_size_in_one_series():
    for hu in (np.zeros((8, 8)), np.zeros((16, 4)), np.full((8, 8), np.nan)):
        assert viewer.png(viewer.slice_figure(hu, 40, 80, "odd")).startswith(PNG)


def test_empty_mask_draws_nothing_and_warns_of_nothing(recwarn):
    ax = viewer.new_figure().add_subplot()
    viewer.show(np.zeros((4, 4)), 40, 80, ax, mask=np.zeros((4, 4), bool))
    assert not ax.collections and not recwarn.list


def test_import_stays_light():
    heavy = ("torch", "ipywidgets", "anywidget", "matplotlib", "pandas", "pydicom")
    code = f"import ctbm.viewer, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# The widget in a browser, with a model that answers as the kernel would: what is seen must be what numpy says.

MODEL = """async ([source, state, slices]) => {
  const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const heard = {};
  const tell = (name, ...said) => (heard[name] || []).forEach((listen) => listen(...said));
  window.asked = [];
  window.model = {
    get: (name) => state[name],
    on: (names, listen) => names.split(" ").forEach((name) => (heard[name] ||= []).push(listen)),
    off: () => {},
    save_changes: () => {},
    set(name, value) {
      if (state[name] === value) return;
      state[name] = value;
      tell(`change:${name}`);
    },
    send(question) {
      window.asked.push(question.index);
      const [meta, buffers] = slices[question.series][question.index];
      setTimeout(() => tell("msg:custom", { ...meta, ...question }, buffers.map(bytes)), 2);
    },
  };
  for (const first of state.first) first.buffers = first.buffers.map(bytes);
  const { default: widget } = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
  document.body.replaceChildren();
  widget.render({ model: window.model, el: document.body });
}"""
STATE = ("index", "level", "width", "chosen", "beside", "about")


@pytest.fixture(scope="module")
def page():
    with browser_page(width=1200, height=900) as page: yield page


def text(buffers):
    return [b64encode(each).decode() for each in buffers]


def opened(page, series, **how):
    "The live viewer of some series on an empty page."
    named = {"": series} if isinstance(series, viewer.Series) else series
    live = viewer.viewer(series, **how)
    state = {name: getattr(live, name) for name in STATE} | {"first": [first | {"buffers": text(first["buffers"])} for first in live.first]}
    packed = {name: [viewer.packed(each, i) for i in range(len(each.images))] for name, each in named.items()}
    slices = {name: [(meta, text(buffers)) for meta, buffers in each] for name, each in packed.items()}
    page.evaluate(MODEL, [live._esm, state, slices])
    made = page.locator(".ctbm-viewer")
    painted(page, " ".join(str(first["index"]) for first in live.first))
    made.focus()
    return made


def painted(page, index):
    page.locator(f".ctbm-viewer[data-painted='{index}']").wait_for(timeout=20_000)


def canvas(page, k=0):
    "Its pixels, uint8[rows, cols, 3]."
    url = page.evaluate("k => document.querySelectorAll('.ctbm-pane > canvas')[k].toDataURL()", k)
    return np.asarray(Image.open(BytesIO(b64decode(url.partition(",")[2]))).convert("RGB"))


def grey(hu, level, width):
    return np.clip(np.floor((hu - (level - width / 2)) * 255 / width + 0.5), 0, 255)


def close(seen, meant):
    return seen.shape[:2] == meant.shape and np.abs(seen.astype(float) - meant[..., None]).max() <= 1


@pytest.fixture(scope="module")
def stack():
    "Slices that differ, wide and low, so that many are quickly there."
    return np.random.default_rng(1).normal(40, 60, (24, 64, 512)).astype(np.float32)


def test_pixels_and_hu_in_the_browser_are_those_of_numpy(page, stack):
    whole = np.rint(stack[:6]).astype(np.int16)
    for images in (whole, stack[:6]):
        made = opened(page, viewer.Series(images, spacing_mm=(0.5, 0.5)))
        assert close(canvas(page), grey(images[2], 40, 80))
        page.keyboard.press("ArrowDown")
        painted(page, 3)
        made.locator("select[title=window]").select_option("bone")
        page.wait_for_function("() => document.querySelector('.ctbm-lower').textContent.includes('W 2800')")
        assert close(canvas(page), grey(images[3], *WINDOWS["bone"]))
        box = made.locator("canvas").bounding_box()
        page.mouse.move(box["x"] + 100.5, box["y"] + 37.5)
        said = made.locator(".ctbm-lower").inner_text().split()
        assert float(said[0]) == float(f"{images[3, 37, 100]:.4g}") and said[1:5] == ["HU", "at", "100,", "37"]
        assert (box["width"], box["height"]) == (512, 64) and abs(made.locator(".ctbm-bar").bounding_box()["width"] - 100) < 2  # 50 mm
    assert not page.said


def test_keys_wheel_slider_and_drag(page, stack):
    made = opened(page, viewer.Series(stack))
    keys = {"End": 23, "PageUp": 13, "ArrowLeft": 12, "Home": 0, "PageDown": 10, "ArrowRight": 11, "ArrowDown": 12}
    for key, index in keys.items():
        page.keyboard.press(key)
        painted(page, index)
    box = made.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 40)
    for turn, index in ((100, 13), (100, 14), (-100, 13)):
        page.mouse.wheel(0, turn)
        painted(page, index)
    made.locator(".ctbm-slide input").fill("20")
    painted(page, 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 130, box["y"] + 20)  # 30 to the right: wider; 20 up: higher
    page.mouse.up()
    assert [page.evaluate("name => model.get(name)", name) for name in ("level", "width")] == [60, 110]
    page.keyboard.press("3")
    assert [page.evaluate("name => model.get(name)", name) for name in ("level", "width")] == list(list(WINDOWS.values())[2])
    page.keyboard.press("0")
    assert [page.evaluate("name => model.get(name)", name) for name in ("level", "width")] == [40, 80]
    page.evaluate("model.set('index', 2)")  # as from Python
    painted(page, 2)
    assert close(canvas(page), grey(stack[2], 40, 80)) and made.locator("output").inner_text() == "3 / 24"


def test_at_the_ends_the_page_scrolls_on_but_not_at_once(page, stack):
    made = opened(page, viewer.Series(stack[:3]), start=1)
    page.evaluate("document.body.style.height = '4000px'; window.free = []; addEventListener('wheel', e => free.push(!e.defaultPrevented))")
    box = made.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 40)
    page.mouse.wheel(0, 100)
    page.mouse.wheel(0, 100)
    painted(page, 2)
    page.wait_for_timeout(1500)
    page.mouse.wheel(0, 100)
    page.wait_for_function("() => free.length === 3")
    assert page.evaluate("free")[0] is False and page.evaluate("free")[2] is True
    page.evaluate("document.body.style.height = ''; scrollTo(0, 0)")


def test_masks_and_heat_lie_where_they_belong(page, stack):
    mask, heat = np.zeros((3, 64, 512), bool), np.zeros((3, 64, 512))
    mask[:, 10:40, 300:350] = True
    heat[:, 20:50, 50:90], heat[:, 20:50, 150:190] = 1.0, 0.2
    made = opened(page, viewer.Series(stack[:3], masks={"truth": mask}, heat=heat))
    coloured = np.ptp(canvas(page).astype(int), axis=-1) > 8
    assert coloured[20:50, 50:90].all() and not coloured[20:50, 150:190].any()  # strong heat, and a trace of it
    assert coloured[9:11, 300:350].any(0).all() and not coloured[14:36, 304:346].any()  # an outline
    made.locator("select[title=masks]").select_option("fill")
    page.wait_for_timeout(300)
    seen = canvas(page).astype(int)
    assert (np.ptp(seen[10:40, 300:350], axis=-1) > 8).all() and (np.ptp(seen[:, 352:], axis=-1) == 0).all()
    page.get_by_label("opacity of heat").fill("0.5")
    page.get_by_label("truth").first.uncheck()
    page.wait_for_timeout(300)
    fainter = canvas(page).astype(int)
    assert np.ptp(fainter[20:50, 50:90], axis=-1).mean() < np.ptp(seen[20:50, 50:90], axis=-1).mean()
    assert (np.ptp(fainter[10:40, 300:350], axis=-1) == 0).all()


def test_side_by_side_scrolls_together_each_in_its_window(page, stack):
    small = viewer.Series(np.clip(stack[:12, ::2, ::2] / 80, 0, 1), unit="", window=(0.5, 1))
    made = opened(page, {"before": viewer.Series(stack), "after": small}, beside=True)
    page.keyboard.press("End")
    painted(page, "23 11")
    assert close(canvas(page), grey(stack[23], 40, 80))
    assert canvas(page, 1).shape == (64, 512, 3) and made.locator(".ctbm-lower").all_inner_texts() == ["L 40 W 80", "L 0.5 W 1"]
    made.get_by_label("series").select_option("after")
    made.get_by_label("beside it").select_option("")
    painted(page, 11)
    assert page.evaluate("model.get('chosen')") == "after" and made.locator("canvas").count() == 1
    page.set_viewport_size({"width": 420, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.set_viewport_size({"width": 1200, "height": 900})


def test_zoom_shows_the_pixel_under_the_pointer_larger(page, stack):
    made = opened(page, viewer.Series(stack[:3]))
    box = made.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + 200.5, box["y"] + 30.5)
    page.keyboard.down("Control")
    for _ in range(4): page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_timeout(300)
    page.mouse.move(box["x"] + 201, box["y"] + 31)
    assert made.locator(".ctbm-lower").inner_text().split()[3:5] == ["200,", "30"]
    assert abs(int(canvas(page)[30, 200, 0]) - grey(stack[1, 30, 200], 40, 80)) <= 1
    page.mouse.dblclick(box["x"] + 200, box["y"] + 30)
    page.wait_for_timeout(300)
    assert close(canvas(page), grey(stack[1], 40, 80))


def test_neighbours_are_fetched_before_they_are_asked_for_and_once(page, stack):
    opened(page, viewer.Series(stack))
    page.wait_for_function("() => asked.length === 11")  # eight ahead, three behind
    assert sorted(page.evaluate("asked")) == [8, 9, 10, *range(12, 20)]
    for index in range(12, 16):
        page.keyboard.press("ArrowDown")
        painted(page, index)
    page.wait_for_function("() => asked.length === 15")
    assert len(set(page.evaluate("asked"))) == 15


def test_a_slice_that_cannot_be_read_says_so_in_its_place(page, stack):
    def read(i):
        if i == 1: raise ValueError("b.dcm: cut short")
        return stack[i]

    made = opened(page, viewer.Series(viewer.Lazy(read, 3)), start=0)
    page.keyboard.press("ArrowDown")
    painted(page, 1)
    assert made.locator(".ctbm-failed").inner_text() == "ValueError: b.dcm: cut short"
    page.keyboard.press("ArrowDown")
    painted(page, 2)
    assert made.locator(".ctbm-failed").inner_text() == "" and close(canvas(page), grey(stack[2], 40, 80))


def test_a_small_image_of_long_pixels_keeps_its_shape(page):
    made = opened(page, viewer.Series(np.eye(20, 40)[None], spacing_mm=(3.0, 1.0)))
    box = made.locator("canvas").bounding_box()
    assert abs(box["height"] / box["width"] - 1.5) < 0.01
