"""The flow, in pure Flax linen: images or sequences to latents. Independent of data, training, files and devices."""

from tarflow_jax.flow.block import Affine, FlowBlock, Given
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.tarflow import TarFlow, conditions, units, updated_prior
from tarflow_jax.flow.tokens import (
    block_orders,
    from_tokens,
    order_within,
    permute,
    to_tokens,
    unpermute,
    without_padding,
)
from tarflow_jax.flow.transformer import Kernels, KVCache, TransformerLayer, cast_kernels

__all__ = [
    "Affine",
    "FlowBlock",
    "Given",
    "KVCache",
    "Kernels",
    "TarFlow",
    "TarFlowConfig",
    "TransformerLayer",
    "block_orders",
    "cast_kernels",
    "conditions",
    "from_tokens",
    "order_within",
    "permute",
    "to_tokens",
    "units",
    "unpermute",
    "updated_prior",
    "without_padding",
]
