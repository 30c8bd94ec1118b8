"""What the tests drive and pip does not carry: a browser, and the programs that check DICOM files.

Debian and its kin get them from their own packages where the tests run as root, as in a container. Elsewhere the browser is Playwright's;
without the DICOM programs their tests say that they skip.
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
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "install", "--yes", "--no-install-recommends", *packages], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})


if __name__ == "__main__":
    missing = wanted()
    if missing and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0: get(missing)
    if "chromium" in wanted(): subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)
    left = [package for package in wanted() if package != "chromium"]
    if left: print(f"not installed: {', '.join(left)}; tests that need them skip")
