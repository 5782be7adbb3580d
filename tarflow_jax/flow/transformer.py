"""The transformer inside a block: one layer, and its key/value cache."""

from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from tarflow_jax.flow.attention import attend, attend_whole, shard_batch, whole_along
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.product import dense_product

MLP_EXPANSION = 4

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as the reference has it. (DenseGeneral flattens kernels before it initialises.)
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class KVCache(NamedTuple):
    """Keys and values of the tokens a layer has seen, by position: each [B, N, R, H].

    Positions come next to the head dimension, so that attending reads a head's cache in the order of memory.
    """

    key: jax.Array
    value: jax.Array

    @classmethod
    def zeros(cls, config: TarFlowConfig, batch_size: int, length: int) -> "KVCache":
        shape = (batch_size, config.num_heads, length, config.head_dim)
        return cls(jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))

    def grow(self, length: int) -> "KVCache":
        """The same with room for `length` tokens."""
        room = ((0, 0), (0, 0), (0, length - self.key.shape[2]), (0, 0))
        return KVCache(jnp.pad(self.key, room), jnp.pad(self.value, room))

    def write(self, key: jax.Array, value: jax.Array, start: jax.Array | int) -> "KVCache":
        """Puts the keys and values [B, N, S, H] of new tokens at positions start .. start + S - 1."""

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=2)

        return KVCache(put(self.key, key), put(self.value, value))

    def read(self) -> "KVCache":
        """Keys and values, each [B, N, R, H]."""
        return self


class StackedCache(flax.struct.PyTreeNode):
    """The keys and values of all layers, of which each writes and reads its part where it is, without a copy.

    Attributes:
      key, value: [L, B, N, T, H], with room for all tokens.
      length: R, of the room that is read.
      layer: whose turn it is.
    """

    key: jax.Array
    value: jax.Array
    length: int = flax.struct.field(pytree_node=False)
    layer: jax.Array

    @classmethod
    def zeros(cls, config: TarFlowConfig, depth: int, batch_size: int, length: int) -> "StackedCache":
        shape = (depth, batch_size, config.num_heads, config.num_tokens, config.head_dim)
        dtype = config.compute_dtype
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), length, jnp.int32(0))

    def write(self, key: jax.Array, value: jax.Array, start: jax.Array | int) -> "StackedCache":
        """As `KVCache.write`, for the layer."""

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype)[None], (self.layer, 0, 0, start, 0))

        return self.replace(key=put(self.key, key), value=put(self.value, value))

    def read(self) -> KVCache:
        """The layer's keys and values, each [B, N, R, H]."""
        _, batch_size, heads, _, size = self.key.shape

        def part(array: jax.Array) -> jax.Array:
            begin, sizes = (self.layer, 0, 0, 0, 0), (1, batch_size, heads, self.length, size)
            return jax.lax.dynamic_slice(array, begin, sizes).squeeze(0)

        return KVCache(part(self.key), part(self.value))


Caches = tuple[KVCache, ...] | StackedCache  # of a block: one a layer, or one of all


def grown(caches: Caches, length: int) -> Caches:
    """The same with room for `length` tokens."""
    if isinstance(caches, StackedCache):
        return caches.replace(length=length)
    return tuple(cache.grow(length) for cache in caches)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x Φ(x), the exact (erf) GELU.

    Its rule computes the derivative beside the value, in one pass: the backward pass then keeps it instead of x,
    and XLA does not recompute erf inside the fusions around its matrix products.
    """
    return _gelu_and_derivative(x)[0]


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    value, derivative = _gelu_and_derivative(primals[0])
    return value, derivative * tangents[0]


def _gelu_and_derivative(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x32 = x.astype(jnp.float32)
    cdf = 0.5 * (1 + jax.lax.erf(x32 * 2**-0.5))
    pdf = jnp.exp(-0.5 * x32 * x32) * (2 * jnp.pi) ** -0.5
    return (x32 * cdf).astype(x.dtype), (cdf + x32 * pdf).astype(x.dtype)


def turn(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the pairs (x_i, x_{i + H/2}) of x [B, N, S, H] by angles [S, H / 2] (rotary embeddings, arXiv 2104.09864).

    The product of a query and a key then depends on where they are by the difference of their angles alone.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angles)[None, None], jnp.cos(angles)[None, None]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


class TransformerLayer(nn.Module):
    """x += Attention(LayerNorm(x)); x += MLP(LayerNorm(x)). The residual stream is float32.

    If it is not `causal`, every token sees every other, and there are no caches.
    """

    config: TarFlowConfig
    causal: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        temperature: jax.Array | None = None,
        angles: jax.Array | None = None,
        cache: KVCache | StackedCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | StackedCache | None]:
        """Runs S tokens [B, S, C] that begin at position `start`, behind those in `cache`.

        Without a cache the tokens are the whole sequence. `temperature` is [B] or None (see `attend`). By `angles`
        [S, H / 2], or None, queries and keys turn (see `turn`).
        """
        config, dtype = self.config, self.config.compute_dtype
        heads = (config.num_heads, config.head_dim)

        x = shard_batch(x)
        h = self._norm("attention_norm")(x).astype(dtype)
        qkv = self._dense((3, *heads), "qkv")(h)
        # `split`'s gradient is one concatenation; indexing's would be a sum of three padded arrays.
        query, key, value = (
            x.squeeze(2).swapaxes(1, 2) for x in jax.lax.split(qkv, (1, 1, 1), axis=2)
        )  # each [B, N, S, H]
        if angles is not None:
            query, key = turn(query, angles), turn(key, angles)
        if cache is not None:
            cache = cache.write(key, value, start)
            key, value = cache.read()
        if cache is None and temperature is None:
            h = attend_whole(query, key, value, config.attention, self.causal)
        else:
            h = attend(query, key, value, start, temperature)
        h = self._dense(config.width, "attention_out", axis=(-2, -1))(h.swapaxes(1, 2))
        x = x + h.astype(jnp.float32)

        h = self._norm("mlp_norm")(x).astype(dtype)
        h = gelu(self._dense(MLP_EXPANSION * config.width, "mlp_in")(h))
        h = self._dense(config.width, "mlp_out")(h)
        return x + h.astype(jnp.float32), cache

    def _norm(self, name: str) -> nn.Module:
        return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, name=name)

    def _dense(self, features: int | tuple[int, ...], name: str, axis: int | tuple[int, ...] = -1) -> nn.Module:
        width_axis = -1 if features == self.config.width else 0  # of the kernel, the one that `fsdp` shards

        def product(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
            return dense_product(x, whole_along(kernel, width_axis), *args, **options)

        return nn.DenseGeneral(
            features,
            axis,
            dtype=self.config.compute_dtype,
            kernel_init=kernel_init,
            dot_general=product,
            name=name,
        )
