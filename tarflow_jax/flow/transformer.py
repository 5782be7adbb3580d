"""The transformer inside a block: one layer, and its KV cache.

Logical axes, which `flax.linen.logical_axis_rules` maps to mesh axes: "batch", "heads" (N) and "hidden" (4C).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tarflow_jax.flow.config import TarFlowConfig

MLP_EXPANSION = 4

# U(-1/√fan_in, 1/√fan_in), as in the reference. DenseGeneral flattens a kernel before initialising it.
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# Finite, because a fully masked row must give 0 * finite, never NaN, in the backward pass.
_MASKED = -1e30


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array | int = 0, temperature: jax.Array | None = None
) -> jax.Array:
    """Computes softmax(q kᵀ / (temperature √H)) v, where query s sees the keys at positions <= start + s.

    Args:
      query: [B, N, S, H], at positions start .. start + S - 1.
      key, value: [B, N, R, H], at positions 0 .. R - 1.
      start: position of the first query.
      temperature: [B], divides the logits of each example (attention-temperature guidance), or None for 1.

    Returns [B, N, S, H], in the dtype of `query`. Logits and softmax are float32.
    """
    scale = jnp.full((query.shape[0],), query.shape[-1] ** -0.5, jnp.float32)
    if temperature is not None:
        scale = scale / temperature
    logits = jnp.einsum("BNSH,BNRH->BNSR", query, key, preferred_element_type=jnp.float32)
    logits = logits * scale[:, None, None, None]
    visible = jnp.arange(key.shape[2])[None, :] <= start + jnp.arange(query.shape[2])[:, None]  # [S, R]
    logits = jnp.where(visible[None, None], logits, _MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    return jnp.einsum("BNSR,BNRH->BNSH", weights, value)


def attend_whole(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool) -> jax.Array:
    """Attends over a whole sequence, each [B, N, T, H]; without `causal`, every query sees every key."""
    return attend(query, key, value, start=0 if causal else key.shape[2])


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What depends on the device: attention over whole sequences, dense matmuls, all-gathers; plain JAX by default.

    Attributes:
      attend: (query, key, value, causal) -> out, as `attend_whole`.
      dot_general: as `jax.lax.dot_general`.
      gather: all-gathers a block's parameters before a loop that uses them.
    """

    attend: Callable[..., jax.Array] = attend_whole
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general
    gather: Callable[[Any], Any] = lambda params: params


class KVCache(NamedTuple):
    """A layer's keys and values of the tokens seen so far, by position: each [B, N, R, H].

    Positions are next to the head dimension, so that attention reads a head's cache contiguously.
    """

    key: jax.Array
    value: jax.Array

    @classmethod
    def zeros(cls, config: TarFlowConfig, batch_size: int, length: int) -> "KVCache":
        shape = (batch_size, config.num_heads, length, config.head_dim)
        return cls(jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))

    def grow(self, length: int) -> "KVCache":
        """Pads the cache to `length` positions."""
        padding = ((0, 0), (0, 0), (0, length - self.key.shape[2]), (0, 0))
        return KVCache(jnp.pad(self.key, padding), jnp.pad(self.value, padding))

    def write(self, key: jax.Array, value: jax.Array, start: jax.Array | int) -> "KVCache":
        """Writes the keys and values [B, N, S, H] of positions start .. start + S - 1."""

        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=2)
        return KVCache(put(self.key, key.astype(self.key.dtype)), put(self.value, value.astype(self.key.dtype)))


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Computes x Φ(x), the exact (erf) GELU.

    The custom JVP computes the derivative together with the value. The backward pass then keeps it instead of x,
    and XLA does not recompute erf inside the fusions around the matmuls.
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


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + H/2}) of x [B, N, S, H] by angles [1 or B, S, H / 2] (RoPE, arXiv 2104.09864).

    The dot product of a query and a key then depends on their positions only through the difference of their angles.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


class TransformerLayer(nn.Module):
    """x += Attention(LayerNorm(x)); x += MLP(LayerNorm(x)). The residual stream is float32.

    Without `causal`, every token sees every other, and there is no cache.
    """

    config: TarFlowConfig
    kernels: Kernels = Kernels()
    causal: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        temperature: jax.Array | None = None,
        angles: jax.Array | None = None,
        cache: KVCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """Applies the layer to S tokens.

        Args:
          x: the residual stream [B, S, C], at positions start .. start + S - 1.
          temperature: [B] or None, see `attend`.
          angles: rotary angles of queries and keys, [1 or B, S, H / 2], or None; see `rotate`.
          cache: keys and values of the tokens before `start`; without one, x is the whole sequence.

        Returns the new residual stream, and the cache with these tokens written.
        """
        config, dtype = self.config, self.config.compute_dtype
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32)
        # With sharded parameters, XLA would otherwise all-gather the batch, which is larger.
        x = nn.with_logical_constraint(x, ("batch", None, None))

        h = norm(name="attention_norm")(x).astype(dtype)
        qkv = self._dense((3, config.num_heads, config.head_dim), "qkv", (None, None, "heads", None))(h)
        # The gradient of `split` is one concatenation; that of indexing would be a sum of three padded arrays.
        thirds = jax.lax.split(qkv, (1, 1, 1), axis=2)
        query, key, value = (third.squeeze(2).swapaxes(1, 2) for third in thirds)  # each [B, N, S, H]
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        if cache is None and temperature is None:
            h = self.kernels.attend(query, key, value, self.causal)
        else:
            if cache is not None:
                key, value = cache = cache.write(key, value, start)
            h = attend(query, key, value, start, temperature)
        out = self._dense(config.width, "attention_out", ("heads", None, None), axis=(-2, -1))
        x = x + out(h.swapaxes(1, 2)).astype(jnp.float32)

        h = norm(name="mlp_norm")(x).astype(dtype)
        h = gelu(self._dense(MLP_EXPANSION * config.width, "mlp_in", (None, "hidden"))(h))
        h = self._dense(config.width, "mlp_out", ("hidden", None))(h)
        return x + h.astype(jnp.float32), cache

    def _dense(
        self, features: int | tuple[int, ...], name: str, axes: tuple[str | None, ...], axis: int | tuple[int, ...] = -1
    ) -> nn.Module:
        """Builds a dense layer whose kernel has the logical `axes` in its matmul, unsharded along the residual stream.

        XLA otherwise multiplies by one device's shard after another, and reads and writes the whole result for each.
        """

        def dot_general(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
            return self.kernels.dot_general(x, nn.with_logical_constraint(kernel, axes), *args, **options)

        dtype = self.config.compute_dtype
        return nn.DenseGeneral(features, axis, dtype=dtype, kernel_init=kernel_init, dot_general=dot_general, name=name)


def stacked_layers(
    config: TarFlowConfig, depth: int, kernels: Kernels, causal: bool = True, name: str | None = None
) -> nn.Module:
    """Builds `depth` layers with parameters stacked along a leading axis: (x, temperature, angles) -> (x, None)."""
    layer: Any = TransformerLayer
    if config.remat == "full":
        layer = nn.remat(layer, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
    return nn.scan(layer, **axes, length=depth)(config, kernels, causal, name=name)


def cast_kernels(params: Any, dtype: jnp.dtype) -> Any:
    """Casts the kernels of dense layers to the dtype of their matmuls, once instead of in each call."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
