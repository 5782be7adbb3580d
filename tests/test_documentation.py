"""The site is built without a warning, its links lead somewhere, and nothing of it is loaded from the network."""

import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from commands import ROOT, environment


class _Links(HTMLParser):
    """What a page links to, and what it loads."""

    def __init__(self, page):
        super().__init__()
        self.links, self.loads = [], []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "a":
            self.links.append(attrs.get("href"))
        elif tag in ("script", "img", "link", "iframe", "source"):
            self.loads.append(attrs.get("src") or attrs.get("href"))


@pytest.mark.slow
def test_the_site_is_built_and_whole(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=environment(NO_MKDOCS_2_WARNING="1"), text=True, capture_output=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert {"index.html", "pipeline.html", "01_digits.html", "tpu_pod.sh.html"} <= {page.name for page in pages}
    for page in pages:
        found = _Links(page)
        assert not [load for load in found.loads if load and urlsplit(load).netloc], page
        if page.name == "404.html":  # its links begin at the site's root, wherever that is
            continue
        for link in filter(None, found.links + found.loads):
            parts = urlsplit(link)
            if not parts.scheme and parts.path:
                assert (page.parent / unquote(parts.path)).exists(), f"{page}: {link}"
