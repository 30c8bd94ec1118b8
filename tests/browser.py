"A real browser and a real JupyterLab, for tests of what people see."

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from playwright.sync_api import Page, sync_playwright
from playwright.sync_api import TimeoutError as Late

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--no-sandbox", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-quic")
SOFTWARE_GL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")


def chromium() -> str | None:
    "A Chromium of the system; None: the one that Playwright installed."
    return next(filter(None, map(shutil.which, NAMES)), None)

# Every cell that holds code has the number of a finished run.
RAN = """() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].every(cell =>
  /\\[\\d+\\]/.test(cell.querySelector('.jp-InputPrompt')?.textContent) || cell.querySelector('.cm-content')?.textContent.trim() === '')"""

STARTED = "() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(prompt => /\\[[*\\d]/.test(prompt.textContent))"


@contextmanager
def browser_page(
    width: int = 1400,  # of the window, pixels
    height: int = 1000,
    **how,  # as for playwright's `new_page`
) -> Iterator[Page]:
    "A page of a headless browser; `page.said` holds what it wrote to its console as an error."
    with sync_playwright() as playwright:
        if chromium() is None and not Path(playwright.chromium.executable_path).is_file():
            pytest.skip("no browser: install chromium, or `python -m playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=chromium(), args=[*QUIET, *SOFTWARE_GL])
        page = browser.new_page(viewport={"width": width, "height": height}, **how)
        page.said = []
        page.on("console", lambda message: page.said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.said.append(str(error)))
        yield page
        browser.close()


# Nothing is asked: not which kernel, not whether there is news.
SETTINGS = {"@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"autoStartDefaultKernel": True},
            "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False}}


def free_port() -> int:
    with closing(socket.socket()) as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def wait_for(
    url: str,
    seconds: float = 60,
) -> None:
    "Until a server answers."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return urlopen(url, timeout=5).close()
        except (URLError, OSError):
            time.sleep(0.3)
    raise TimeoutError(f"{url} did not answer in {seconds:g} seconds")


@contextmanager
def jupyter_lab(
    folder: Path,  # what it serves; its settings go there too, so that nobody's own are touched
) -> Iterator[str]:  # its address
    "A JupyterLab server of this environment, ended with the block."
    port, settings = free_port(), folder / ".jupyter"
    homes = {f"JUPYTER_{what}_DIR": str(settings / what.lower()) for what in ("CONFIG", "DATA", "RUNTIME")}
    words = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0",
             "--IdentityProvider.token=", "--ServerApp.password=", f"--LabApp.workspaces_dir={settings}",
             f"--LabApp.user_settings_dir={settings}", f"--ServerApp.root_dir={folder}"]
    for name, values in SETTINGS.items():
        (settings / name).parent.mkdir(parents=True)
        (settings / name).write_text(json.dumps(values))
    with (settings / "server.log").open("w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | homes)
        try:
            wait_for(f"http://127.0.0.1:{port}/api")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try: server.wait(30)
            except subprocess.TimeoutExpired: server.kill()


def run_all(
    page: Page,
    lab: str,  # address of a JupyterLab
    name: str,  # of a notebook in its folder
    seconds: float = 180,
) -> None:
    "Open a notebook in JupyterLab and run all its cells, as a person would, until the kernel is idle again."
    page.goto(f"{lab}/lab/tree/{name}?reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
    page.locator("[data-status='idle']").first.wait_for(timeout=60_000)
    for _ in range(20):  # the command does nothing until the kernel is connected
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        try:
            page.wait_for_function(STARTED, timeout=3000)
            break
        except Late: pass
    page.wait_for_function(RAN, timeout=1000 * seconds)


def write_notebook(
    path: Path,
    *cells: str,
) -> Path:
    "A notebook of code cells for the kernel of this environment."
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nbformat.write(made, path)
    return path
