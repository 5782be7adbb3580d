"""Attention: the plain one, and the kernels that platforms have for whole sequences."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tarflow_jax.errors import UserError

KERNELS = ("auto", "plain", "cudnn", "splash")
ATTENDED = "attended"  # name of what splash's backward pass needs, for policies of `jax.checkpoint`
_SPLASH_BLOCK = 128
_SPLASH_MIN_TOKENS = 2 * _SPLASH_BLOCK
BATCH_AXES = ("data", "fsdp")  # of the mesh, over which a batch is sharded

# Finite, because a fully masked row must give 0 * finite, never NaN, in the backward pass.
_MASKED = -1e30


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array | int = 0, temperature: jax.Array | None = None
) -> jax.Array:
    """softmax(q k / (temperature sqrt(H))) v, where query s sees the keys at positions <= start + s.

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


def device_kind() -> str:
    """Of the mesh in force, which need not be of this machine (launch.plan), else of the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0].device_kind if mesh.empty else mesh.abstract_device.device_kind


def choose_kernel(kernel: str, num_tokens: int, dtype: jnp.dtype) -> str:
    """ "auto" made definite: cuDNN's on NVIDIA in bfloat16, splash on a TPU from 256 tokens, else the plain one.

    The device is the mesh's in force (`jax.set_mesh`), which need not be of this machine (launch.plan), else the
    default one.
    """
    if kernel != "auto":
        return kernel
    kind = device_kind()
    if kind.startswith("NVIDIA") and dtype == jnp.bfloat16:
        return "cudnn"
    if kind.startswith("TPU") and num_tokens >= _SPLASH_MIN_TOKENS and num_tokens % _SPLASH_BLOCK == 0:
        return "splash"
    return "plain"


def attend_whole(
    query: jax.Array, key: jax.Array, value: jax.Array, kernel: str = "auto", causal: bool = True
) -> jax.Array:
    """`attend` for a whole sequence, T queries and T keys [B, N, T, H], by one of `KERNELS`.

    If it is not `causal`, every query sees every key.
    """
    chosen = choose_kernel(kernel, query.shape[2], query.dtype)
    maker = {"cudnn": "NVIDIA", "splash": "TPU"}.get(chosen, "")
    if not device_kind().startswith(maker):
        raise UserError(f"model.attention is {chosen!r}, which needs a device of kind {maker}; this is {device_kind()}")
    if chosen == "cudnn":
        heads_last = (x.swapaxes(1, 2) for x in (query, key, value))
        out = jax.nn.dot_product_attention(*heads_last, is_causal=causal, implementation="cudnn")
        return out.swapaxes(1, 2)
    if chosen == "splash":
        return splash(query, key, value, causal=causal)
    return attend(query, key, value, start=0 if causal else key.shape[2])


def shard_batch(x: jax.Array) -> jax.Array:
    """x [B, …], its rows sharded over the mesh in force and every other dimension whole; without a mesh, x.

    XLA otherwise answers parameters sharded over `fsdp` by gathering the batch, which is larger, instead of them.
    """
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES)) if many_devices() else x


def whole_along(kernel: jax.Array, axis: int) -> jax.Array:
    """A kernel of which one axis may be sharded over `fsdp`, gathered along it; without a mesh, the same.

    XLA otherwise multiplies by one device's part after another, and for every part reads and writes the whole result.
    """
    if not many_devices():
        return kernel
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * kernel.ndim
    spec[axis] = None
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*spec))


def many_devices() -> bool:
    """Whether the mesh in force has several devices; inside `jax.shard_map` each device works alone."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and not mesh.manual_axes


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool = True, interpret: bool = False
) -> jax.Array:
    """Pallas's blockwise attention for TPUs, which keeps no [T, T] in memory; T is a multiple of 128.

    XLA cannot partition a Pallas call, so under a mesh (`jax.set_mesh`) each device runs its own examples and heads.
    `interpret` runs it on a CPU, for tests.
    """
    run = functools.partial(_splash, causal=causal, interpret=interpret)
    if many_devices():
        spec = PartitionSpec(BATCH_AXES, "tensor")
        run = jax.shard_map(run, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return run(query * query.shape[-1] ** -0.5, key, value)


def _splash(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention

    _, num_heads, num_tokens, _ = query.shape
    mask = (splash_attention.CausalMask if causal else splash_attention.FullMask)((num_tokens, num_tokens))
    block = next(size for size in (512, 256, _SPLASH_BLOCK) if num_tokens % size == 0)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * num_heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=ATTENDED,
    )
    return jax.vmap(kernel)(query, key, value)
