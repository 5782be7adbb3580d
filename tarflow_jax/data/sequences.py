"""In-memory tables and sequences with optional conditions, masks and labels, validated."""

import copy
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from tarflow_jax.data.source import MAX_CLASSES, SPLITS, checked_labels, split_of
from tarflow_jax.errors import UserError
from tarflow_jax.files import read_npz
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.flow import TarFlowConfig

KIND = "array:"
NAMES = ("x", "condition", "mask", "labels")
ROUNDING = 1e-4  # float32 rounding errors above this, in standard deviations, are logged
logger = logging.getLogger(__name__)


class Arrays(NamedTuple):
    """Sequences in the data's units, in place of a batch's images."""

    x: Any  # float32 [B, T, D] or [B, T]
    condition: Any = None  # float32 [B, C] or [B, T, C]
    lengths: Any = None  # int32 [B]


class SequenceSource:
    """Rows of a table, or sequences, in place of an `ImageSource`.

    Attributes:
      arrays: `Arrays` [N, …]; padding is 0.
      labels: int32 [N]; None if there are none.
      shape: the fields of `TarFlowConfig` that the data determine.
    """

    label_names: tuple[str, ...] = ()
    preprocessing = "none"

    def __init__(self, x: Any, condition: Any = None, mask: Any = None, labels: Any = None) -> None:
        """Takes the arguments of `tarflow_jax.fit`.

        Raises ValueError, naming row and column, for non-finite numbers, shapes that do not match and holes in the
        mask.
        """
        x = np.asarray(x)
        if x.ndim not in (2, 3) or not np.issubdtype(x.dtype, np.floating) or 0 in x.shape:
            raise UserError(f"x is {x.dtype} {list(x.shape)}; expected floats [N, F] or [N, T, D]")
        count, num_tokens = x.shape[:2]
        if mask is not None and x.ndim == 2:
            raise UserError("a mask is for sequences [N, T, D]; x is a table")
        lengths = None if mask is None else lengths_of(mask, count, num_tokens)
        exists = None if lengths is None else np.arange(num_tokens)[None] < lengths[:, None]
        self.shape: dict[str, Any] = {"sequence_shape": (num_tokens, x.shape[2] if x.ndim == 3 else 0)}
        self.shape |= {"condition_dim": 0, "condition_kind": "vector", "num_classes": 0}
        if num_tokens == 1:
            self.shape["start_token"] = True  # without it, a flow cannot transform a single token
        if condition is not None:
            condition = np.asarray(condition)
            by_token, expected = condition.ndim == 3, f"[{count}, C] or [{count}, {num_tokens}, C] of numbers"
            fits = condition.size and condition.shape[:-1] in ((count,), (count, num_tokens))
            if not fits or condition.dtype.kind not in "biuf":
                raise UserError(f"condition is {condition.dtype} {list(condition.shape)}; expected {expected}")
            self.shape |= {"condition_dim": condition.shape[-1], "condition_kind": "tokens" if by_token else "vector"}
            condition = _floats("condition", condition, exists if by_token else None)
        self.arrays, self.labels = Arrays(_floats("x", x, exists), condition, lengths), None
        if labels is not None:
            self.labels = checked_labels("labels", np.asarray(labels), count, MAX_CLASSES)
            self.shape["num_classes"] = int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.arrays.x)

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[Arrays, np.ndarray | None]:
        """Returns the given rows and their labels."""
        return jax.tree.map(lambda values: values[indices], (self.arrays, self.labels))

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """Returns the given rows as a source of the same shape."""
        part = copy.copy(self)
        part.arrays, part.labels = self.read(indices)
        return part

    @property
    def units(self) -> dict[str, np.ndarray]:
        """Means and standard deviations of the columns, named like a flow's constants and broadcastable to them.

        Raises ValueError for constant columns; warns about columns that float32 rounds noticeably.
        """
        x, condition, lengths = self.arrays
        exists = None if lengths is None else np.arange(x.shape[1])[None] < lengths[:, None]
        mean, std = _units("x", x, exists)
        if x.ndim == 2:
            mean, std = mean[:, None], std[:, None]  # each token is one number
        units = {"mean": mean, "std": std}
        if condition is not None:
            mean, std = _units("condition", condition, exists if condition.ndim == 3 else None)
            units |= {"condition_mean": mean, "condition_std": std}
        return units

    @property
    def fingerprint(self) -> str:
        """A hexadecimal hash of rows and labels, independent of where they are stored."""
        return fingerprint((self.arrays, self.labels))


def open_arrays(name: str, split: str, config: TarFlowConfig | None = None) -> SequenceSource:
    """Opens one split of "array:FILE", an npz file with `x` and optional `condition`, `mask` and `labels`.

    The test split is `x_test` and so on if the file has them, else a tenth of the rows, chosen by a hash of x. Raises
    UserError for a damaged or unsuitable file, for rows that do not fit `config`, and as `SequenceSource` does.
    """
    path = os.path.expanduser(name.removeprefix(KIND))
    if not name.startswith(KIND) or not path:
        raise UserError(f"data.source is {name!r}; expected array:FILE, an npz file, for a flow of sequences")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of {name}; expected one of {', '.join(SPLITS)}")
    arrays = read_npz(path, tuple(key + suffix for key in NAMES for suffix in ("", "_test")))
    names, tested = ([key for key in NAMES if key + suffix in arrays] for suffix in ("", "_test"))
    if "x" not in names or tested not in ([], names):
        raise UserError(
            f"{name} has {', '.join(arrays) or 'none of its arrays'}; expected x, perhaps {', '.join(NAMES[1:])}, and "
            "for another test split all of them with _test"
        )
    suffix = "_test" if tested and split == "test" else ""
    try:
        source = SequenceSource(**{key: arrays[key + suffix] for key in names})
        for field, actual in source.shape.items() if config else ():
            expected = getattr(config, field)
            if actual != expected and not (field == "num_classes" and actual < expected):  # a split may lack classes
                hint = "leave model.sequence_shape out, and the shape follows from the data"
                raise UserError(f"model.{field} is {expected}, the data's is {actual}; {hint}")
    except UserError as error:
        raise UserError(f"{name}{', its test arrays' if suffix else ''}: {error}") from None
    if tested:
        return source
    rows = [index for index, row in enumerate(source.arrays.x) if split_of(row.tobytes().hex()) == split]
    if not rows:
        raise UserError(f"{name}: none of its {len(source)} rows falls into the {split} split; expected more rows")
    return source.take(rows)


def lengths_of(mask: Any, batch_size: int, num_tokens: int) -> Any:
    """Returns lengths int32 [B] from a mask bool [B, T] or from lengths; raises ValueError for holes and misfits."""
    traced = isinstance(mask, jax.core.Tracer)
    mask = mask if traced else np.asarray(mask)
    if mask.dtype == bool and mask.shape == (batch_size, num_tokens):
        lengths = mask.sum(1)
        if not traced and (holes := np.flatnonzero((mask[:, 1:] & ~mask[:, :-1]).any(1))).size:
            raise UserError(f"mask has a hole in row {holes[0]}; expected padding behind all tokens")
    elif np.issubdtype(mask.dtype, np.integer) and mask.shape == (batch_size,):
        lengths = mask
    else:
        expected = f"bool [{batch_size}, {num_tokens}] or lengths [{batch_size}]"
        raise UserError(f"mask is {mask.dtype} {list(mask.shape)}; expected {expected}")
    if not traced and (wrong := np.flatnonzero((lengths < 1) | (lengths > num_tokens))).size:
        raise UserError(f"row {wrong[0]} of mask has {lengths[wrong[0]]} tokens; expected 1 to {num_tokens}")
    return lengths.astype(np.int32)


def _floats(name: str, values: np.ndarray, exists: np.ndarray | None) -> np.ndarray:
    """Returns values [N, …, columns] as float32, 0 outside `exists` bool [N, T]; raises ValueError if not finite."""
    with np.errstate(over="ignore"):
        floats = values.astype(np.float32)
    if exists is not None:
        floats = np.where(exists[..., None], floats, np.float32(0))
    if (wrong := np.argwhere(~np.isfinite(floats))).size:
        row, *_, column = wrong[0]
        value = values[tuple(wrong[0])]
        raise UserError(f"{name} is {value} in row {row}, column {column}; expected finite numbers of float32's range")
    return floats


def _units(name: str, x: np.ndarray, exists: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns each column's mean and standard deviation over x [N, …, columns] where `exists`, bool [N, T]."""
    values = x.reshape(-1, x.shape[-1]) if exists is None else x[exists]
    mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    rounding = np.finfo(np.float32).eps * np.abs(values).max(0)
    if (constant := np.flatnonzero(std <= rounding)).size:
        raise UserError(f"{name} is constant in column {constant[0]} ({mean[constant[0]]:g}); leave it out")
    if (rounded := np.flatnonzero(rounding > ROUNDING * std)).size:
        message = "float32 rounds column %d of %s to %.0e of its standard deviation; subtract its mean before"
        logger.warning(message, rounded[0], name, (rounding / std)[rounded[0]])
    return mean, std
