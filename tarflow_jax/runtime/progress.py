"""Progress bars, of one kind."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

DELAY_S = 3  # shorter work shows none


def progress(items: Iterable[Any] | None, description: str | None, **options: Any) -> tqdm:
    """A bar with the time that is left: only on a terminal, and gone when the work is done.

    Args:
      items: to go through; None for a bar that is told of them by `update`.
      description: what the work is called; None for no bar.
      options: of tqdm: total, unit.
    """
    disable = True if description is None else None  # None: where there is no terminal
    return tqdm(items, description, disable=disable, leave=False, delay=DELAY_S, **options)
