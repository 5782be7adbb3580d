"""Results as text: tables and protocols."""

from collections.abc import Mapping, Sequence
from typing import Any


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with one row a mapping, columns in the order they first appear, and floats to 5 digits."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_cell(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" if i != 1 else f"|-{line}-|" for i, line in enumerate(lines))


def format_protocol(protocol: Mapping[str, Any]) -> str:
    """One `name: value` a line, nested names joined by dots."""
    lines = []
    for name, value in protocol.items():
        if isinstance(value, Mapping):
            lines += [f"{name}.{line}" for line in format_protocol(value).splitlines()]
        else:
            lines.append(f"{name}: {value}")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
