"""A hash of a model's weights, stored with results that are valid only for them."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def fingerprint(variables: Any) -> str:
    """Hashes the names, order and bytes of all arrays to 16 hexadecimal digits. Reads every parameter.

    All processes must call it together: arrays sharded across processes are all-gathered, one at a time.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
