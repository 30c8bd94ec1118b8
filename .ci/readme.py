"Write README.md from nbs/index.ipynb, as nbdev_readme would if Quarto were a package."
import sys
from pathlib import Path

from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from traitlets.config import Config

ROOT = Path(__file__).parents[1]


def readme() -> str:
    "The index notebook as Markdown: prose, code and text outputs; links to notebooks stay relative to the root."
    config = Config(TagRemovePreprocessor={"enabled": True, "remove_cell_tags": {"hide"}})
    exporter = MarkdownExporter(config=config)
    exporter.register_preprocessor(TagRemovePreprocessor(config=config), enabled=True)
    body, _ = exporter.from_filename(str(ROOT / "nbs" / "index.ipynb"))
    return "<!-- Written from nbs/index.ipynb by .ci/readme.py. Do not edit. -->\n\n" + body.replace("](images/", "](nbs/images/").strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf8")
    sys.exit(0)
