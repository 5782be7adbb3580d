"""How MkDocs reads this repository.

Notebooks become pages, and so does each source file that a page links to. Equations become MathML, which browsers
typeset without a script. llms.txt lists the pages of the navigation.
"""

import html
import itertools
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

logger = get_plugin_logger("hooks")

_ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<=\]\()[^)#\s:]+")  # of Markdown, to a file
_LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", "": "docker"}
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)  # of pymdownx.arithmatex
_OPERATORS = {"~": "∼", ";": ";"}  # that latex2mathml takes for identifiers
_SCRIPTS = ("msub", "msup", "msubsup", "munder")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of notebooks, with their outputs as they are, and of source files."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        stem = file.src_uri.removesuffix(".ipynb")
        name = posixpath.basename(stem)
        text, resources = MarkdownExporter().from_filename(
            file.abs_src_path, {"unique_key": name, "output_files_dir": name}
        )
        files.remove(file)
        files.append(File.generated(config, f"{stem}.md", content=text))
        for picture, data in resources["outputs"].items():
            files.append(File.generated(config, posixpath.join(posixpath.dirname(stem), picture), content=data))
    pages = list(files.documentation_pages())
    for source in sorted({source for page in pages for source in _sources(page)}):
        path = _ROOT / source
        text = f"# {source}\n\n````{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n````\n"
        files.append(File.generated(config, _page_of(source), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Points links to notebooks and to source files at their pages; the first sentence becomes the description."""
    folder = posixpath.dirname(page.file.src_uri)
    page.meta.setdefault("description", _description(markdown))

    def target(link: re.Match[str]) -> str:
        source = _source(link[0], folder)
        if source:
            return posixpath.relpath(_page_of(source), folder or ".")
        return link[0].removesuffix(".ipynb") + ".md" if link[0].endswith(".ipynb") else link[0]

    return _LINK.sub(target, markdown)


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Typesets equations."""

    def typeset(equation: re.Match[str]) -> str:
        tex = html.unescape(equation[2]).strip()
        try:
            found = mathml(tex, "block" if equation[1] == "div" else "inline")
        except Exception as error:  # latex2mathml raises many
            logger.warning("%s: equation %r: %r", page.file.src_uri, tex, error)
            return equation[0]
        return f'<div class="equation">{found}</div>' if equation[1] == "div" else found

    return _EQUATION.sub(typeset, content)


def on_page_context(context: Any, page: Page, config: Any, nav: Any) -> Any:
    """Writes llms.txt when the home page is built: all pages have been read by then."""
    if page.is_homepage:
        lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", *_index(nav.items)]
        Path(config.site_dir, "llms.txt").write_text("\n".join(lines) + "\n")
    return context


def mathml(tex: str, display: str) -> str:
    """Converts TeX to MathML, whose functions have TeX's spaces around them ("log p", not "logp").

    Raises:
      ValueError: latex2mathml does not know a command.
    """
    root = ElementTree.fromstring(convert(tex.replace("{aligned}", "{align*}"), xmlns="", display=display))
    for element in root.iter():
        text = element.text or ""
        if "\\" in text:
            raise ValueError(f"unknown command {text}")
        if element.tag == "mo" and len(text) > 1 and text.isalpha():  # max, det
            element.tag, element.attrib = "mi", {}
        elif element.tag == "mi" and text in _OPERATORS:
            element.tag, element.text = "mo", _OPERATORS[text]
        elif element.tag == "mo" and text == "|":
            element.attrib = {"stretchy": "false", "lspace": "0", "rspace": "0"}
    for row in [element for element in root.iter() if element.tag in ("math", "mrow", "mtd")]:
        for i, (left, right) in reversed(list(enumerate(itertools.pairwise(row), 1))):
            functions = _is_function(left), _is_function(right)
            if any(functions) and not {left.tag, right.tag} & {"mo", "mspace"}:
                row.insert(i, ElementTree.Element("mspace", width="0.167em"))
    return ElementTree.tostring(root, encoding="unicode")


def _is_function(element: ElementTree.Element) -> bool:
    """Whether it is a function's name, such as log, or one with scripts."""
    base = element[0] if element.tag in _SCRIPTS else element
    return base.tag == "mi" and len(base.text or "") > 1


def _description(markdown: str) -> str:
    """The first sentence of a page, without markup; of a page that has none, the names that it documents."""
    text = re.sub(r"^(```+).*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    paragraphs = (block for block in re.split(r"\n\s*\n", text) if re.match(r"\n*[\w`*\[]", block))
    if (paragraph := next(paragraphs, None)) is None:
        return ", ".join(re.findall(r"^::: ([\w.]+)", markdown, re.MULTILINE))
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
    text = re.sub(r"[*`$]", "", text)
    return re.split(r"(?<=[.!?]) ", text)[0]


def _index(items: list[Any], depth: int = 2) -> Iterator[str]:
    """A line for each page of the navigation, under the titles of its sections."""
    for item in items:
        if item.is_section:
            yield from ("", "#" * depth + f" {item.title}", "", *_index(item.children, depth + 1))
        else:
            yield f"- [{item.title}]({item.url}): {item.meta['description']}"


def _sources(page: File) -> list[str]:
    links = _LINK.findall(page.content_string)
    found = [_source(link, posixpath.dirname(page.src_uri)) for link in links]
    return [source for source in found if source]


def _source(link: str, folder: str) -> str | None:
    """The path in the repository of what a link names, if it is a file outside docs/."""
    path = posixpath.normpath(posixpath.join("docs", folder, link))
    return path if not path.startswith(("docs/", "../")) and (_ROOT / path).is_file() else None


def _page_of(source: str) -> str:
    return f"source/{source}.md"
