"""FID's InceptionV3 (the network of December 2015, "pt_inception-2015-12-05-6726825d.pth") in Flax.

It differs from the InceptionV3 of model zoos: 1,008 outputs, average pools that exclude the padding, a max pool in the
last block, and images resized by TensorFlow 1's bilinear rule. Batch normalisation is folded into the convolutions when
weights are loaded. Modules are named as in the PyTorch file.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from tarflow_jax.errors import UserError, one_line
from tarflow_jax.evaluation.features import FeatureNetwork, Features
from tarflow_jax.files import sha256
from tarflow_jax.interop.tensors import load_tensors

SPATIAL_CHANNELS = 7  # of mixed_6/conv:0, for sFID
BATCH_NORM_EPSILON = 1e-3
PUBLISHED_FILE = "pt_inception-2015-12-05-6726825d.pth"


def resize_like_tensorflow1(images: jax.Array, size: int = 299) -> jax.Array:
    """Resizes float images [B, H, W, K] to [B, size, size, K] by TensorFlow 1's bilinear rule.

    Output pixel i reads input coordinate i * H / size: pixel corners, not centres, are aligned, without antialiasing.
    Every published FID was computed this way.
    """
    for axis in (2, 1):
        length = images.shape[axis]
        position = jnp.arange(size, dtype=jnp.float32) * jnp.float32(length / size)
        low = position.astype(jnp.int32)
        high = jnp.minimum(low + 1, length - 1)
        weight = jnp.expand_dims(position - low.astype(jnp.float32), [a for a in range(4) if a != axis])
        left, right = jnp.take(images, low, axis), jnp.take(images, high, axis)
        images = left + (right - left) * weight
    return images


# 3 x 3 pools of [B, H, W, K]: the maximum at stride 2, and at stride 1 the mean of the pixels inside the image only.
max_pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
average_pool = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)


def convolution(
    x: jax.Array, features: int, rows: int = 1, columns: int = 1, strides: int = 1, same: bool = True, *, name: str
) -> jax.Array:
    """Applies a convolution with a bias, then ReLU; `same` keeps the image's size at stride 1."""
    padding = "SAME" if same and strides == 1 else "VALID"
    return nn.relu(nn.Conv(features, (rows, columns), strides, padding, name=name)(x))


# Name -> a sequence of convolutions (features, rows, columns); a pair of them runs in parallel.
Branches = Mapping[str, tuple[tuple, ...]]

BLOCK_A = {
    "branch1x1": ((64, 1, 1),),
    "branch5x5": ((48, 1, 1), (64, 5, 5)),
    "branch3x3dbl": ((64, 1, 1), (96, 3, 3), (96, 3, 3)),
}
BLOCK_B = {"branch3x3": ((384, 3, 3),), "branch3x3dbl": ((64, 1, 1), (96, 3, 3), (96, 3, 3))}
BLOCK_D = {
    "branch3x3": ((192, 1, 1), (320, 3, 3)),
    "branch7x7x3": ((192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)),
}
BLOCK_E = {
    "branch1x1": ((320, 1, 1),),
    "branch3x3": ((384, 1, 1), ((384, 1, 3), (384, 3, 1))),
    "branch3x3dbl": ((448, 1, 1), (384, 3, 3), ((384, 1, 3), (384, 3, 1))),
}


def block_c(inner: int) -> Branches:
    """Returns branches with factorised 7 x 7 convolutions, `inner` channels wide."""
    return {
        "branch1x1": ((192, 1, 1),),
        "branch7x7": ((inner, 1, 1), (inner, 1, 7), (192, 7, 1)),
        "branch7x7dbl": ((inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7)),
    }


class Block(nn.Module):
    """Concatenates parallel branches and a pool; `strides` is that of their last convolutions and of the pool."""

    branches: Branches
    pool: Callable[[jax.Array], jax.Array]
    pool_features: int = 0  # of the convolution after the pool; 0 for none
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        outputs = []
        for branch, layers in self.branches.items():
            y = x
            for i, layer in enumerate(layers, 1):
                name = f"{branch}_{i}" if len(layers) > 1 else branch
                if isinstance(layer[0], tuple):
                    y = jnp.concatenate([convolution(y, *layer[k], name=name + "ab"[k]) for k in (0, 1)], axis=-1)
                else:
                    strides = self.strides if i == len(layers) else 1
                    features, rows, columns = layer
                    y = convolution(y, features, rows, columns, strides, name=name)
            outputs.append(y)
        pooled = self.pool(x)
        if self.pool_features:
            pooled = convolution(pooled, self.pool_features, name="branch_pool")
        return jnp.concatenate([*outputs, pooled], axis=-1)


class InceptionV3(nn.Module):
    """Maps images uint8 [B, H, W, 1 or 3] to pool_3 [B, 2048], logits [B, 1008] and spatial [B, 17 * 17 * 7].

    Grey images are repeated to three channels. The spatial features are the first 7 channels of mixed_6/conv:0,
    flattened as rows, columns, channels.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        images = jnp.broadcast_to(images, (*images.shape[:-1], 3)).astype(jnp.float32)
        x = (resize_like_tensorflow1(images) - 128.0) / 128.0  # [B, 299, 299, 3]
        x = convolution(x, 32, 3, 3, strides=2, name="Conv2d_1a_3x3")
        x = convolution(x, 32, 3, 3, same=False, name="Conv2d_2a_3x3")
        x = max_pool(convolution(x, 64, 3, 3, name="Conv2d_2b_3x3"))  # [B, 73, 73, 64]
        x = convolution(x, 80, name="Conv2d_3b_1x1")
        x = max_pool(convolution(x, 192, 3, 3, same=False, name="Conv2d_4a_3x3"))  # [B, 35, 35, 192]
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = Block(BLOCK_A, average_pool, pool_features, name=name)(x)
        x = Block(BLOCK_B, max_pool, strides=2, name="Mixed_6a")(x)  # [B, 17, 17, 768]
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = Block(block_c(inner), average_pool, 192, name=name)(x)
            if name == "Mixed_6d":  # TensorFlow's mixed_6; mixed_6/conv, its first branch, comes first in x
                spatial = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        x = Block(BLOCK_D, max_pool, strides=2, name="Mixed_7a")(x)  # [B, 8, 8, 1280]
        x = Block(BLOCK_E, average_pool, 192, name="Mixed_7b")(x)
        # The original pools by the maximum by mistake, which is now the standard.
        last_pool = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
        x = Block(BLOCK_E, last_pool, 192, name="Mixed_7c")(x)
        pooled = x.mean((1, 2))
        logits = nn.Dense(1008, use_bias=False, name="fc")(pooled)
        return Features(pooled, logits, spatial)


def inception_network(path: str | Path) -> FeatureNetwork:
    """Reads FID's network from a local PyTorch file, without executing code in it.

    Raises FileNotFoundError if there is no file, UserError if it holds anything else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"Inception weights {path} not found; expected the local file {PUBLISHED_FILE}")
    state = {name: tensor.double().numpy() for name, tensor in load_tensors(path).items()}
    convolutions = [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]
    try:
        folded: dict[str, Any] = {name: _fold_batch_norm(state, name) for name in convolutions}
        folded["fc"] = {"kernel": jnp.float32(state["fc.weight"].T)}
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} does not hold FID's InceptionV3: no such tensor {one_line(error)}") from error
    model, params = InceptionV3(), unflatten_dict(folded, sep=".")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))["params"]
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, shapes):
        raise UserError(f"{path} does not hold FID's InceptionV3: its layers or their shapes differ")
    digest = sha256(path)
    published = digest[:8] in PUBLISHED_FILE  # its name ends in these digits
    note = f"the published {PUBLISHED_FILE}" if published else "NOT the published weights: no FID compares"
    preprocessing = "grey repeated to RGB, TensorFlow 1 bilinear resize to 299 x 299, (v - 128) / 128"
    activations = 64 * 2**20  # 299 x 299 pixels and the two widest layers
    return FeatureNetwork("inception", f"sha256 {digest} ({note})", preprocessing, model, params, activations)


def _fold_batch_norm(state: dict[str, np.ndarray], name: str) -> dict[str, jax.Array]:
    """Folds batch normalisation into the convolution before it; returns a kernel [h, w, I, O] and a bias, float32."""
    bias, mean, variance = (state[f"{name}.bn.{part}"] for part in ("bias", "running_mean", "running_var"))
    scale = state[f"{name}.bn.weight"] / np.sqrt(variance + BATCH_NORM_EPSILON)
    kernel = np.einsum("oihw,o->hwio", state[f"{name}.conv.weight"], scale)
    return {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias - mean * scale)}
