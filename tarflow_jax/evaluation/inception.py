"""FID's InceptionV3 (the network of December 2015, "pt_inception-2015-12-05") in Flax.

It differs from the InceptionV3 of model zoos: 1,008 outputs, average pools that exclude the padding, a max pool in the
last block, and images resized by TensorFlow 1's bilinear rule. Batch normalisation is folded into the convolutions when
weights are loaded (`interop/inception_weights.py`). Modules are named as in the PyTorch file.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.features import FeatureNetwork, Features
from tarflow_jax.interop.inception_weights import PUBLISHED_HASH_PREFIX, load_inception_weights

Array = jax.Array

IMAGE_SIZE = 299
SPATIAL_CHANNELS = 7  # of mixed_6/conv:0, for sFID


def resize_like_tensorflow1(images: Array, size: int = IMAGE_SIZE) -> Array:
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


def max_pool(x: Array, strides: int = 2, padding: int = 0) -> Array:
    """3 x 3 max pool of [B, H, W, K]."""
    return nn.max_pool(x, (3, 3), (strides, strides), ((padding, padding),) * 2)


def average_pool(x: Array) -> Array:
    """3 x 3 mean of [B, H, W, K] at stride 1, over the pixels inside the image only."""
    return nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False)


def _convolve_by_patches(x: Array, kernel: Array, strides: int) -> Array:
    """Convolves one image [H, W, I] without padding, as one matmul with the matrix of its patches."""
    rows, columns, inputs, outputs = kernel.shape
    height = (x.shape[0] - rows) // strides + 1
    width = (x.shape[1] - columns) // strides + 1
    taps = [
        x[i : i + strides * (height - 1) + 1 : strides, j : j + strides * (width - 1) + 1 : strides]
        for i in range(rows)
        for j in range(columns)
    ]
    patches = jnp.concatenate(taps, axis=-1).reshape(height * width, rows * columns * inputs)
    return (patches @ kernel.reshape(-1, outputs)).reshape(height, width, outputs)


def convolve(x: Array, kernel: Array, strides: int, padding: tuple[int, int]) -> Array:
    """NHWC convolution.

    XLA's is slow on CPUs for large images and for strides; there a matmul with patches, image by image so that they
    stay in the cache, is 2 to 4 times faster.
    """
    rows, columns = kernel.shape[:2]
    pads = tuple((p, p) for p in padding)
    if jax.default_backend() == "cpu" and rows == columns == 1:
        return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])
    if jax.default_backend() == "cpu" and (x.shape[1] > 64 or strides > 1):
        padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        return lax.map(lambda image: _convolve_by_patches(image, kernel, strides), padded)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (strides, strides), pads, dimension_numbers=numbers)


class Convolution(nn.Module):
    """Convolution with a bias, then ReLU; `same` keeps the image's size at stride 1."""

    features: int
    rows: int = 1
    columns: int = 1
    strides: int = 1
    same: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.rows, self.columns, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        padding = (self.rows // 2, self.columns // 2) if self.same and self.strides == 1 else (0, 0)
        return nn.relu(convolve(x, kernel, self.strides, padding) + bias[None, None, None])


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
    """Branches with factorised 7 x 7 convolutions, `inner` channels wide."""
    return {
        "branch1x1": ((192, 1, 1),),
        "branch7x7": ((inner, 1, 1), (inner, 1, 7), (192, 7, 1)),
        "branch7x7dbl": ((inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7)),
    }


class Block(nn.Module):
    """Concatenates parallel branches and a pool; `strides` holds for their last convolutions and for the pool."""

    branches: Branches
    pool: Callable[[Array], Array]
    pool_features: int = 0  # of the convolution after the pool; 0: no convolution
    strides: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        outputs = []
        for branch, layers in self.branches.items():
            y = x
            for i, layer in enumerate(layers, 1):
                name = f"{branch}_{i}" if len(layers) > 1 else branch
                if isinstance(layer[0], tuple):
                    y = jnp.concatenate([Convolution(*layer[k], name=name + "ab"[k])(y) for k in (0, 1)], axis=-1)
                else:
                    y = Convolution(*layer, self.strides if i == len(layers) else 1, name=name)(y)
            outputs.append(y)
        pooled = self.pool(x)
        if self.pool_features:
            pooled = Convolution(self.pool_features, name="branch_pool")(pooled)
        return jnp.concatenate([*outputs, pooled], axis=-1)


class InceptionV3(nn.Module):
    """Images uint8 [B, H, W, 3] of any size to pool_3 [B, 2048], logits [B, 1008] and spatial [B, 17 * 17 * 7].

    The spatial features are the first 7 channels of mixed_6/conv:0, flattened as rows, columns, channels.
    """

    @nn.compact
    def __call__(self, images: Array) -> Features:
        x = (resize_like_tensorflow1(images.astype(jnp.float32)) - 128.0) / 128.0  # [B, 299, 299, 3]
        x = Convolution(32, 3, 3, strides=2, name="Conv2d_1a_3x3")(x)
        x = Convolution(32, 3, 3, same=False, name="Conv2d_2a_3x3")(x)
        x = max_pool(Convolution(64, 3, 3, name="Conv2d_2b_3x3")(x))  # [B, 73, 73, 64]
        x = Convolution(80, name="Conv2d_3b_1x1")(x)
        x = max_pool(Convolution(192, 3, 3, same=False, name="Conv2d_4a_3x3")(x))  # [B, 35, 35, 192]
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = Block(BLOCK_A, average_pool, pool_features, name=name)(x)
        x = Block(BLOCK_B, max_pool, strides=2, name="Mixed_6a")(x)  # [B, 17, 17, 768]
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = Block(block_c(inner), average_pool, 192, name=name)(x)
            if name == "Mixed_6d":  # TensorFlow's mixed_6; mixed_6/conv, its first branch, comes first in x
                spatial = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        x = Block(BLOCK_D, max_pool, strides=2, name="Mixed_7a")(x)  # [B, 8, 8, 1280]
        x = Block(BLOCK_E, average_pool, 192, name="Mixed_7b")(x)
        last_pool = functools.partial(max_pool, strides=1, padding=1)  # a mistake of the original, now the standard
        x = Block(BLOCK_E, last_pool, 192, name="Mixed_7c")(x)
        pooled = x.mean((1, 2))
        logits = nn.Dense(1008, use_bias=False, name="fc")(pooled)
        return Features(pooled, logits, spatial)


def _features_of_any(params: Any, images: Array) -> Features:
    return InceptionV3().apply({"params": params}, jnp.broadcast_to(images, (*images.shape[:-1], 3)))


def inception_network(path: str | Path) -> FeatureNetwork:
    """Returns FID's network with the weights of a local PyTorch file; grey images are repeated to three channels.

    Raises FileNotFoundError, and UserError for a file of anything else.
    """
    params, sha256 = load_inception_weights(path)
    model = InceptionV3()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))["params"]
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, shapes):
        raise UserError(f"{path} does not hold FID's InceptionV3: its layers or their shapes differ")
    published = sha256.startswith(PUBLISHED_HASH_PREFIX)
    note = "the published pt_inception-2015-12-05" if published else "NOT the published weights: no FID compares"
    return FeatureNetwork(
        name="inception",
        identity=f"sha256 {sha256} ({note})",
        preprocessing="grey repeated to RGB, TensorFlow 1 bilinear resize to 299 x 299, (v - 128) / 128",
        variables=jax.tree.map(jnp.asarray, params),
        apply=_features_of_any,
        bytes_per_image=64 * 2**20,  # 299 x 299 pixels and the two widest layers
    )
