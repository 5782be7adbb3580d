"""Elements of a page. What they hold is text, escaped when the page is written, never markup."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as ET

MAX_CELL, MAX_ROWS, MAX_COLUMNS, MAX_DEPTH = 300, 200, 20, 4  # letters of a cell; of a table; of nested values


def element(name: str, /, *children: "ET.Element | str | None", **attributes: Any) -> ET.Element:
    """An element; `class_` and `for_` are the attributes that Python has no such names for, `_` stands for a dash."""
    made = ET.Element(name, {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items()})
    for child in children:
        if isinstance(child, ET.Element):
            made.append(child)
        elif child is not None and len(made):
            made[-1].tail = (made[-1].tail or "") + child
        elif child is not None:
            made.text = (made.text or "") + child
    return made


def text_of(value: Any) -> str:
    """A value as a reader wants it: numbers to five digits, long texts cut, what is nested in a list not shown."""
    if isinstance(value, list | tuple):
        text = ", ".join("…" if isinstance(item, list | Mapping) else text_of(item) for item in value[:MAX_CELL])
    elif isinstance(value, float):
        text = f"{value:.5g}"
    elif value is None or isinstance(value, bool):
        text = {True: "yes", False: "no", None: "unknown"}[value]
    elif isinstance(value, int) and 9999 < abs(value) < 10**18:
        text = f"{value:,}"
    else:
        text = "…" if isinstance(value, Mapping) else str(value)
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}…"


def flat(mapping: Mapping[str, Any], depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Nested mappings as one, their names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping) and depth:
            found |= {f"{name}.{inner}": leaf for inner, leaf in flat(value, depth - 1).items()}
        else:
            found[str(name)] = value
    return found


def facts(mapping: Mapping[str, Any]) -> ET.Element:
    """A table of two columns: name and value."""
    rows = [
        element("tr", element("th", text_of(name), scope="row"), element("td", text_of(value)))
        for name, value in list(flat(mapping).items())[:MAX_ROWS]
    ]
    return element("div", element("table", *rows), class_="wide")


def table(rows: Sequence[Mapping[str, Any]]) -> ET.Element:
    """A table with a heading: a row a mapping, columns in the order they first appear."""
    columns = list(dict.fromkeys(name for row in rows[:MAX_ROWS] for name in row))[:MAX_COLUMNS]
    head = element("tr", *(element("th", text_of(name), scope="col") for name in columns))
    body = [element("tr", *(element("td", text_of(row.get(name, ""))) for name in columns)) for row in rows[:MAX_ROWS]]
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="wide")


def folded(title: str, *children: ET.Element, open_: bool = False) -> ET.Element:
    """What opens when its title is clicked."""
    return element("details", element("summary", title), *children, **({"open": ""} if open_ else {}))


def section(title: str, *children: "ET.Element | str | None") -> ET.Element | None:
    """A heading and what is below it; None if that is nothing."""
    found = [child for child in children if child is not None]
    return element("section", element("h2", title), *found) if found else None


def document(body: Iterable["ET.Element | None"], title: str, style: str, script: str, policy: str) -> str:
    """The whole page. `style` and `script` go in as they are: they are to be ours."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        ET.Element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    )
    main = element("main", *body)
    whole = element("html", head, element("body", main, element("script", script)), lang="en")
    return "<!DOCTYPE html>\n" + ET.tostring(whole, encoding="unicode", method="html") + "\n"
