"""Device-specific kernels: attention over whole sequences, and the matmul of the training step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tarflow_jax.errors import UserError
from tarflow_jax.flow import Kernels, TarFlow, TarFlowConfig
from tarflow_jax.flow.transformer import attend_whole
from tarflow_jax.runtime.mesh import BATCH_AXES, default_device, many_devices
from tarflow_jax.runtime.sharding import gathered

_SPLASH_BLOCK = 128
_SPLASH_MIN_TOKENS = 2 * _SPLASH_BLOCK
_Axes = tuple[tuple[int, ...], tuple[int, ...]]  # of both operands


@functools.cache  # partials of equal arguments are not equal, and flows are cache keys
def device_flow(config: TarFlowConfig) -> TarFlow:
    """Returns a flow with the attention kernel of the device it is traced for."""
    attend = functools.partial(attend_on_device, kernel=config.attention)
    return TarFlow(config, Kernels(attend, gather=gathered))


def in_float32(config: TarFlowConfig) -> TarFlowConfig:
    """Returns the config in float32; in lower precision, bits per dimension are wrong in the second decimal."""
    attention = "auto" if config.attention == "cudnn" else config.attention  # cuDNN's kernel lacks float32
    return dataclasses.replace(config, dtype="float32", attention=attention)


@functools.cache
def training_kernels(config: TarFlowConfig) -> Kernels:
    """Returns kernels that support reverse-mode differentiation only."""
    return Kernels(functools.partial(attend_on_device, kernel=config.attention), dot_general_of_training)


def attend_on_device(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool, kernel: str) -> jax.Array:
    """Computes `attend_whole` by the kernel `TarFlowConfig.attention`; raises UserError if the device lacks it."""
    chosen = choose_kernel(kernel, query.shape[2], query.dtype)
    maker = {"cudnn": "NVIDIA", "splash": "TPU"}.get(chosen, "")
    if not device_kind().startswith(maker):
        raise UserError(f"model.attention is {chosen!r}, which needs a device of kind {maker}; this is {device_kind()}")
    if chosen == "cudnn":
        if query.dtype == jnp.float32:
            raise UserError("model.attention is 'cudnn', which needs model.dtype=bfloat16; this model is in float32")
        heads_last = (x.swapaxes(1, 2) for x in (query, key, value))
        out = jax.nn.dot_product_attention(*heads_last, is_causal=causal, implementation="cudnn")
        return out.swapaxes(1, 2)
    if chosen == "splash":
        return splash(query, key, value, causal)
    return attend_whole(query, key, value, causal)


def choose_kernel(kernel: str, num_tokens: int, dtype: jnp.dtype) -> str:
    """Resolves "auto": cuDNN on NVIDIA in bfloat16, splash on a TPU from 256 tokens, else "plain"."""
    if kernel != "auto":
        return kernel
    kind = device_kind()
    if kind.startswith("NVIDIA") and dtype == jnp.bfloat16:
        return "cudnn"
    if kind.startswith("TPU") and num_tokens >= _SPLASH_MIN_TOKENS and num_tokens % _SPLASH_BLOCK == 0:
        return "splash"
    return "plain"


def device_kind() -> str:
    """Returns the device kind of the current mesh (with launch.plan, another machine's), or of the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    return default_device().device_kind if mesh.empty else mesh.abstract_device.device_kind


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, causal: bool = True, *, interpret: bool = False
) -> jax.Array:
    """Attends with Pallas's blockwise TPU kernel, without materializing the logits [T, T]; T is a multiple of 128.

    XLA cannot partition a Pallas call, so under a mesh each device runs its own examples and heads. `interpret` runs it
    on a CPU, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    num_tokens = query.shape[2]
    mask = (splash_attention.CausalMask if causal else splash_attention.FullMask)((num_tokens, num_tokens))
    block = next(size for size in (512, 256, _SPLASH_BLOCK) if num_tokens % size == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        masks = splash_attention.MultiHeadMask([mask] * query.shape[1])  # a device may have some of the heads
        kernel = splash_attention.make_splash_mha(
            masks, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        return jax.vmap(kernel)(query, key, value)

    if many_devices():
        spec = PartitionSpec(BATCH_AXES, "tensor")
        run = jax.shard_map(run, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return run(query * query.shape[-1] ** -0.5, key, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot_general_of_training(
    x: jax.Array, kernel: jax.Array, dimensions: tuple[_Axes, _Axes], precision: Any = None
) -> jax.Array:
    """Computes `jax.lax.dot_general` of activations [..., *K] and a kernel [*K, *M], as Flax's dense layers call it.

    The kernel's gradient xᵀg transposes x or the cotangent g in memory. JAX always transposes g, even if x is four
    times narrower. This transposes the narrower one, which on a CPU saves a tenth to a quarter of a training step
    (docs/lab/performance.md). It has no forward-mode derivative.
    """
    return jax.lax.dot_general(x, kernel, dimensions, precision)


def _forward(x: jax.Array, kernel: jax.Array, *options: Any) -> tuple[jax.Array, Any]:
    return dot_general_of_training(x, kernel, *options), (x, kernel)


def _backward(
    dimensions: tuple[_Axes, _Axes], precision: Any, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    num_contracted = len(dimensions[0][1])
    num_features = kernel.ndim - num_contracted
    features_of_g = tuple(range(g.ndim - num_features, g.ndim))
    features_of_kernel = tuple(range(num_contracted, kernel.ndim))
    x_grad = jax.lax.dot_general(g, kernel, ((features_of_g, features_of_kernel), ((), ())), precision)

    rows = tuple(range(x.ndim - num_contracted))
    contract_rows = ((rows, rows), ((), ()))
    if x.size <= g.size:
        return x_grad, jax.lax.dot_general(x, g, contract_rows, precision)
    # Without the barrier, XLA folds the transposition into a matmul for which its fast library has no kernel.
    kernel_grad = jax.lax.optimization_barrier(jax.lax.dot_general(g, x, contract_rows, precision))  # [*M, *K]
    order = (*range(num_features, kernel.ndim), *range(num_features))
    return x_grad, kernel_grad.transpose(order)


dot_general_of_training.defvjp(_forward, _backward)
