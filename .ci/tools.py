"""What the tests drive and pip does not carry: a browser, and the programs that check DICOM files.

Debian and its kin get them from their own packages where the tests run as root, as in a container. Elsewhere the browser is Playwright's;
what cannot be had is said here, and by the tests that skip for want of it.
"""
import os
import shutil
import subprocess
import sys

PACKAGES = {"chromium": "chromium", "dciodvfy": "dicom3tools", "dsr2html": "dcmtk"}  # program: Debian's name
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def wanted() -> list[str]:
    "Packages whose program is not here."
    found = {program: shutil.which(program) for program in PACKAGES} | {"chromium": next(filter(None, map(shutil.which, BROWSERS)), None)}
    return [package for program, package in PACKAGES.items() if not found[program]]


def get(
    packages: list[str],
) -> None:
    "Debian's packages, for root."
    apt = ["apt-get", "--quiet=2", "--option=Dpkg::Use-Pty=0"]
    settings = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        subprocess.run([*apt, *words], stdout=subprocess.DEVNULL, env=settings)


if __name__ == "__main__":
    missing = wanted()
    if missing and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0: get(missing)
    if "chromium" in wanted(): subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"])
    if left := wanted(): print(f"not installed for the whole system: {', '.join(left)}; tests that find none skip, and say so")
