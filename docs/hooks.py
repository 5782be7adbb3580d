"""How MkDocs reads this repository: notebooks are pages, and so is each source file that a page links to."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

_ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<=\]\()[^)#\s:]+")  # of Markdown, to a file
_LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", "": "docker"}


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
    """Points links to notebooks and to source files at their pages."""
    folder = posixpath.dirname(page.file.src_uri)

    def target(link: re.Match[str]) -> str:
        source = _source(link[0], folder)
        if source:
            return posixpath.relpath(_page_of(source), folder or ".")
        return link[0].removesuffix(".ipynb") + ".md" if link[0].endswith(".ipynb") else link[0]

    return _LINK.sub(target, markdown)


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
