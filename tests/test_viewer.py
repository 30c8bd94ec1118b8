"The viewer where a person watches, where nobody does, and under the laws of its window."

import json
import subprocess
import sys
from base64 import b64decode

import nbformat
import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel
from matplotlib import pyplot as plt
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from ctbm import viewer

WIDGET = "application/vnd.jupyter.widget-view+json"
PNG = b"\x89PNG\r\n\x1a\n"
SHOW = """
import numpy as np
from ctbm import viewer
volume = np.random.default_rng(0).normal(40, 20, (5, 32, 24))
viewer.view(volume, titles=list("abcde"))
"""
HOLD = "made = []; real = viewer.sliders; viewer.sliders = lambda *a, **k: made.append(real(*a, **k)) or made[-1]; viewer.view(volume)"
SLIDE = """
picture, slice, *_ = made[0].children
before = picture.value
slice.value = 5
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
    (said,) = outputs(kernel, SLIDE, allow_stdin=True)
    assert said["text"] == "True b'PNG'\n"


def test_nobody_watching_gets_one_picture(notebook):
    (output,) = notebook.cells[0].outputs
    assert set(output["data"]) == {"image/png", "text/plain"} and b64decode(output["data"]["image/png"]).startswith(PNG)
    assert output["metadata"]["image/png"]["alt"] == "slice 3, level (HU) 40, width (HU) 80"
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
    assert shown[1]["data"]["image/png"][:200] in page and "Run this cell for its sliders." in page and "html-manager" not in page


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


def test_view_starts_at_the_middle_slice_and_widens_for_unusual_windows(monkeypatch):
    asked = {}
    monkeypatch.setattr(viewer, "interactive", lambda draw, **controls: asked.update(controls, figure=draw(1, 40, 80)))
    viewer.view([np.zeros((4, 4))] * 6, level=-600, width=4000)
    assert asked["slice"] == (1, 6, 1, 3) and asked["level_hu"] == (-600, 800, 1, -600) and asked["width_hu"] == (1, 4000, 1, 4000)


def test_slices_of_different_size_in_one_series():
    for hu in (np.zeros((8, 8)), np.zeros((16, 4)), np.full((8, 8), np.nan)):
        assert viewer.png(viewer.slice_figure(hu, 40, 80, "odd")).startswith(PNG)


def test_empty_mask_draws_nothing_and_warns_of_nothing(recwarn):
    ax = viewer.new_figure().add_subplot()
    viewer.show(np.zeros((4, 4)), 40, 80, ax, mask=np.zeros((4, 4), bool))
    assert not ax.collections and not recwarn.list


def test_import_stays_light():
    code = "import ctbm.viewer, sys; print([m for m in ('torch', 'ipywidgets', 'matplotlib', 'pandas', 'pydicom') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
