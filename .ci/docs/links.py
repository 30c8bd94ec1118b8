"Whether the pages of a site hold together: what they link to exists, and they ask nothing of a server elsewhere."
import re
from functools import cache
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src", "video": "src"}
TAG = re.compile(r"<([a-z]\w*)\s((?:[^>\"]|\"[^\"]*\")*)>")
ATTRIBUTE = re.compile(r"([\w-]+)=\"([^\"]*)\"")
NOT_FETCHED = {"canonical", "next", "prev", "search", "index", "author"}


class Page:
    "The anchors of a page, its links, and the files it loads."

    def __init__(self, path: Path):
        self.ids, self.links, self.loads = set(), set(), set()
        for tag, inside in TAG.findall(path.read_text(encoding="utf8")):
            values = {name: unescape(value) for name, value in ATTRIBUTE.findall(inside)}
            self.ids |= {values[k] for k in ("id", "name") if k in values}
            if tag == "a" and values.get("href"): self.links.add(values["href"])
            elif values.get(FETCHED.get(tag)) and values.get("rel") not in NOT_FETCHED: self.loads.add(values[FETCHED[tag]])


def broken(folder: Path) -> list[str]:
    "Each link that leads nowhere, missing file, and file from elsewhere, with the page that has it."
    page, wrong = cache(Page), []
    for path in sorted(folder.rglob("*.html")):
        name = path.relative_to(folder)
        for target in sorted(page(path).loads | page(path).links):
            parts, loaded = urlsplit(target), target in page(path).loads
            if parts.scheme == "data" or parts.scheme and not loaded: continue
            if parts.scheme or parts.netloc: wrong.append(f"{name}: loads {target} from elsewhere"); continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not there.is_file(): wrong.append(f"{name}: {target} does not exist")
            elif parts.fragment and there.suffix == ".html" and unquote(parts.fragment) not in page(there).ids:
                wrong.append(f"{name}: {target} has no such place")
    return wrong
