"""The site builds without a warning, its links and anchors exist, it loads nothing from elsewhere; pages are short."""

import json
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from commands import ROOT, environment

DOCS = ROOT / "docs"
# Words of a page; those of a notebook are its Markdown cells'.
MOST_WORDS = {
    "README.md": 450,
    "docs/index.md": 200,
    "docs/concepts.md": 1200,
    "docs/howto/*.md": 700,
    "docs/howto/arrays.md": 800,
    "docs/launching.md": 800,
    "docs/tutorials/*.ipynb": 800,
    "docs/results.md": 600,
    "docs/comparison.md": 700,
    "docs/mathematics.md": 1000,
    "docs/architecture.md": 1000,
    "docs/formats.md": 500,
    "docs/robustness.md": 1000,
}
MOST_WORDS_TOGETHER = {
    ("CONTRIBUTING.md", "MAINTAINING.md"): 780,
    ("docs/lab/*.md",): 8000,
    ("*.md", "docs/*.md", "docs/api/*.md", "docs/howto/*.md", "docs/tutorials/*.ipynb"): 16600,
}
NOT_COUNTED = ("CHANGELOG.md",)
VOID = ("br", "hr", "img", "input", "link", "meta", "source")


class _Page(HTMLParser):
    """What a page links to, what it loads, its anchors, and its text outside code, scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors, self.text, self.equations, self._inside = [], [], set(), "", "", []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs.get("id"), attrs.get("name")}
        if tag not in VOID:
            self._inside.append(tag)
        if tag == "a":
            self.links.append(attrs.get("href"))
        elif tag in ("script", "img", "link", "iframe", "source"):
            self.loads.append(attrs.get("src") or attrs.get("href"))

    def handle_endtag(self, tag):
        while tag in self._inside and self._inside.pop() != tag:  # <p> and <li> may be left open
            pass

    def handle_data(self, data):
        if "math" in self._inside:
            self.equations += data
        elif not {"code", "pre", "script", "style", "svg"} & set(self._inside):
            self.text += data


@pytest.mark.slow
def test_the_site_is_built_and_whole(tmp_path):
    folder = tmp_path.resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=environment(NO_MKDOCS_2_WARNING="1"), text=True, capture_output=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    pages = {path: _Page(path) for path in sorted(folder.rglob("*.html"))}
    assert {"index.html", "pipeline.html", "02_digits.html", "block.py.html"} <= {path.name for path in pages}
    _check_links(pages)
    _check_equations(folder, pages)
    _check_index(folder)


def _check_links(pages):
    """Links and anchors exist, and nothing is loaded from the network."""
    for path, page in pages.items():
        assert not [load for load in page.loads if load and urlsplit(load).netloc], path
        if path.name == "404.html":  # its links begin at the site's root, wherever that is
            continue
        for link in filter(None, page.links + page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].anchors, f"{path}: {link}"


def _check_equations(folder, pages):
    """Equations are MathML, and no TeX is left."""
    mathematics = pages[folder / "mathematics.html"].source
    assert mathematics.count("<math") > 50
    assert mathematics.count('<math display="block"') > 10
    for path, page in pages.items():
        assert 'class="arithmatex"' not in page.source, path
        assert not re.search(r"\$\$|\\\(|\\\[|\$\\", page.text), path
        assert "\\" not in page.equations, path


def _check_index(folder):
    """llms.txt has a line for every page of the navigation."""
    lines = re.findall(r"^- \[(.+)\]\((.+)\): (.+)$", (folder / "llms.txt").read_text(), re.MULTILINE)
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert [path for _, path, _ in lines] == [page.removesuffix(".md") + ".html" for page in _pages_of(navigation)]
    assert all((folder / path).exists() for _, path, _ in lines)
    assert max(len(description) for _, _, description in lines) < 300


def _pages_of(navigation):
    """The paths of all pages in the `nav` of mkdocs.yml."""
    for entry in navigation:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            yield from _pages_of(target) if isinstance(target, list) else [target]


def _words(path):
    """Counts the words of a page, or of a notebook's Markdown cells."""
    if path.suffix != ".ipynb":
        return len(path.read_text().split())
    cells = json.loads(path.read_text())["cells"]
    return sum(len("".join(cell["source"]).split()) for cell in cells if cell["cell_type"] == "markdown")


def _found(pattern):
    """The pages that a pattern names, at least one."""
    paths = [path for path in sorted(ROOT.glob(pattern)) if path.name not in NOT_COUNTED]
    assert paths, pattern
    return paths


def test_pages_are_short():
    limits = {path: most for pattern, most in MOST_WORDS.items() for path in _found(pattern)}
    assert {path.name: (_words(path), most) for path, most in limits.items() if _words(path) > most} == {}
    for patterns, most in MOST_WORDS_TOGETHER.items():
        together = {path for pattern in patterns for path in _found(pattern)}
        assert sum(map(_words, together)) <= most, patterns
    counted = {path for patterns in MOST_WORDS_TOGETHER for pattern in patterns for path in _found(pattern)}
    assert set(DOCS.rglob("*.md")) | set(DOCS.rglob("*.ipynb")) <= counted


def test_links_of_files_outside_the_site_exist():
    for file in ROOT.glob("*.md"):
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)\s]+))?\)", file.read_text()):
            path = ROOT / target if target else file
            assert path.exists(), f"{file.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


def test_functions_that_the_mathematics_name_exist():
    named = re.findall(r"\[`([\w.]+)`\]\(\.\./(tarflow_jax/[\w/]+)\.py\)", (DOCS / "mathematics.md").read_text())
    assert len(named) > 30
    for name, module in named:
        assert pkgutil.resolve_name(f"{module.replace('/', '.')}:{name}") is not None


def test_architecture_names_paths_that_exist():
    text = (DOCS / "architecture.md").read_text()
    paths = re.findall(r"`((?:[\w.]+/)+(?:[\w.]+\.\w+)?|[\w]+\.py)`", text)
    assert len(paths) > 30
    folders = ROOT, ROOT / "tarflow_jax"
    assert [path for path in paths if not any((folder / path).exists() for folder in folders)] == []
