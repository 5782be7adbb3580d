"""Samples for metrics, in chunks on disk: 50,000 images survive a kill, and several processes share the work.

Chunk i comes from the key fold_in(key(seed), i) and nothing else, so it does not matter who draws it, or when.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tarflow_jax.errors import UserError
from tarflow_jax.figures import to_uint8
from tarflow_jax.files import read_npz, write_npz, write_text
from tarflow_jax.runtime import progress

NOT_FINITE = 128  # the grey that stands for a pixel which is no number


class Samples(NamedTuple):
    """Images uint8 [N, H, W, K], labels int32 [N] (None if unconditional), and how many images held NaN or infinity.

    Such images stay in the set, their bad pixels grey: a model that makes them is judged by them.
    """

    images: np.ndarray
    labels: np.ndarray | None
    num_not_finite: int


def quantise(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float images [B, H, W, K] in [-1, 1] to the nearest 8-bit values, and bool [B]: is it not finite?"""
    finite = np.isfinite(images)
    values = to_uint8(np.where(finite, images, 0))
    return np.where(finite, values, np.uint8(NOT_FINITE)), ~finite.all((1, 2, 3))


def chunk_folder(root: epath.PathLike, protocol: Mapping[str, Any]) -> epath.Path:
    """The folder of one protocol's chunks; it names itself after the protocol, and says it in protocol.json.

    `protocol` must hold all that the samples depend on: model, seed, guidance, denoising, chunk size. Two
    protocols never share a folder, so a run with another guidance cannot continue this one by mistake.
    """
    text = json.dumps(dict(protocol), indent=2, sort_keys=True)
    folder = epath.Path(root) / hashlib.sha256(text.encode()).hexdigest()[:16]
    write_text(folder / "protocol.json", text)
    return folder


def labels_in_proportion(class_counts: Sequence[int] | np.ndarray, num_images: int) -> np.ndarray | None:
    """Labels int32 [num_images], of whose first n every class has about its share; None without classes.

    Each is the class that is furthest behind, the lowest of several: 0, 1, 2 … in turn where `class_counts`, integers
    [C], are equal.
    """
    if not len(class_counts):
        return None
    share, drawn = np.asarray(class_counts, np.int64), np.zeros(len(class_counts), np.int64)
    total = share.sum()
    labels = np.empty(num_images, np.int32)
    for i in range(num_images):
        labels[i] = np.argmax(share * (i + 1) - total * drawn)
        drawn[labels[i]] += 1
    return labels


def generate(
    sample: Callable[[jax.Array, int, jax.Array | None], jax.Array],
    folder: epath.PathLike,
    num_images: int,
    chunk_size: int,
    class_counts: Sequence[int] | np.ndarray,
    seed: int,
) -> None:
    """Draws the chunks of `num_images` samples that are not in `folder` yet; of several processes each its share.

    `sample(key, number, labels)` returns float images [number, H, W, K] in [-1, 1], for `labels_in_proportion`. Every
    chunk is drawn whole, so the first images do not depend on how many are asked for. Nothing is drawn twice, NaN or
    not.
    """
    num_chunks = -(-num_images // chunk_size)
    all_labels = labels_in_proportion(class_counts, num_chunks * chunk_size)
    mine = range(jax.process_index(), num_chunks, jax.process_count())
    for index in progress(mine, f"samples, {chunk_size} at a time"):
        path = _chunk_path(folder, index)
        if path.exists():
            continue
        key = jax.random.fold_in(jax.random.key(seed), index)
        chosen = slice(index * chunk_size, (index + 1) * chunk_size)
        drawn = sample(key, chunk_size, None if all_labels is None else jnp.asarray(all_labels[chosen]))
        images, not_finite = quantise(np.asarray(drawn))
        write_npz(path, images=images, not_finite=not_finite)


def read_chunks(
    folder: epath.PathLike, num_images: int, chunk_size: int, class_counts: Sequence[int] | np.ndarray
) -> Samples:
    """The first `num_images` samples of a folder. Raises FileNotFoundError while a chunk is missing, and
    ValueError for one that is damaged."""
    images, not_finite = [], []
    for index in range(-(-num_images // chunk_size)):
        path = _chunk_path(folder, index)
        chunk = read_npz(path, ("images", "not_finite"))
        if {"images", "not_finite"} - chunk.keys() or len(chunk["images"]) != chunk_size:
            raise UserError(f"{path} is not a chunk of {chunk_size} samples; delete it and run again")
        images.append(chunk["images"])
        not_finite.append(chunk["not_finite"])
    return Samples(
        np.concatenate(images)[:num_images],
        labels_in_proportion(class_counts, num_images),
        int(np.concatenate(not_finite)[:num_images].sum()),
    )


def _chunk_path(folder: epath.PathLike, index: int) -> epath.Path:
    return epath.Path(folder) / f"chunk_{index:05d}.npz"
