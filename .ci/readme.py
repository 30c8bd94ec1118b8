"Write README.md from nbs/index.ipynb, as nbdev_readme would if Quarto were a package."
import re
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
MARK = "<!-- Written from nbs/index.ipynb by .ci/readme.py. Do not edit. -->\n\n"


def readme() -> str:
    "The index notebook as Markdown, its links and pictures found from the root."
    body, _ = MarkdownExporter().from_filename(str(ROOT / "nbs" / "index.ipynb"))
    body = re.sub(r"\]\((?!\w+:|[#/.])", "](nbs/", body).replace("](../", "](")
    return MARK + body.strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf8")
