"""A series of 512 x 512 x 300 in JupyterLab: the viewer against ipyniivue in the same browser. Prints medians and ratios.

Run it from the project's folder as a module: `python -m benchmarks.viewer`.
"""

import statistics
import tempfile
import time
from pathlib import Path

from tests.browser import browser_page, jupyter_lab, run_all, write_notebook

SERIES = """
import time
from pathlib import Path
import numpy as np
base = np.random.default_rng(0).normal(40, 20, (512, 512)).astype(np.int16)
stack = np.stack([np.roll(base, i, 1) for i in range(300)])
Path("started").write_text(str(time.time()))
"""
CTBM = """
from ctbm import viewer
viewer.view(viewer.Series(stack))
"""
NIIVUE = """
import numpy as np
from ctbm.viewer import nifti
from ipyniivue import NiiVue, SliceType
made = NiiVue(height=512, slice_type=SliceType.AXIAL)
made.load_volumes([dict(data=nifti(stack.T, np.eye(4)), name="series.nii", colormap="gray", cal_min=0, cal_max=80)])
made
"""
SHOWN = {"ctbm": "() => document.querySelector('.ctbm-viewer')?.dataset.painted",
         "ipyniivue": """() => {
  const canvas = [...document.querySelectorAll("canvas")].find((each) => each.getContext("webgl2"));
  if (!canvas) return false;
  const [gl, pixels] = [canvas.getContext("webgl2"), new Uint8Array(4 * 4096)];
  const box = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: 1, clientX: box.left + 256, clientY: box.top + 200, bubbles: true }));
  gl.readPixels(canvas.width / 2 - 32, canvas.height / 2 - 32, 64, 64, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
  return new Set(pixels.filter((_, i) => i % 4 === 0)).size > 30;
}"""}
STEP = {"ctbm": """async (down) => {
  await new Promise(requestAnimationFrame);
  const root = document.querySelector(".ctbm-viewer");
  const was = root.dataset.painted;
  const start = performance.now();
  root.querySelector(".ctbm-pane").dispatchEvent(new WheelEvent("wheel", { deltaY: down, bubbles: true, cancelable: true }));
  while (!root.dataset.painted || root.dataset.painted === was) await new Promise(requestAnimationFrame);
  return performance.now() - start;
}""",
        "ipyniivue": """async (down) => {
  await new Promise(requestAnimationFrame);
  const canvas = [...document.querySelectorAll("canvas")].find((each) => each.getContext("webgl2"));
  const [gl, box] = [canvas.getContext("webgl2"), canvas.getBoundingClientRect()];
  const start = performance.now();
  canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: down, clientX: box.left + box.width / 2, clientY: box.top + 200, bubbles: true }));
  gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4));
  await new Promise(requestAnimationFrame);
  return performance.now() - start;
}"""}


def measured(name, code, lab, folder):
    "Seconds from running the cell to the first picture, milliseconds from the wheel to the next one."
    write_notebook(folder / f"{name}.ipynb", SERIES, code)
    with browser_page() as page:
        run_all(page, lab, f"{name}.ipynb", 600)
        page.wait_for_function(SHOWN[name], timeout=300_000, polling=200)
        first = time.time() - float((folder / "started").read_text())
        steps = [page.evaluate(STEP[name], down) for down in [100] * 15 + [-100] * 15]
        return first, statistics.median(steps)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with jupyter_lab(folder) as lab:
            found = {name: measured(name, code, lab, folder) for name, code in {"ctbm": CTBM, "ipyniivue": NIIVUE}.items()}
    for k, (what, unit) in enumerate((("first picture", "s"), ("step of the wheel", "ms"))):
        ours, theirs = found["ctbm"][k], found["ipyniivue"][k]
        print(f"{what:20} ctbm {ours:8.1f} {unit:3} ipyniivue {theirs:8.1f} {unit:3} ratio {theirs / ours:.1f}")
