"""The flow, in pure Flax linen: data to latents and back. Independent of training, files and devices."""

from tarflow_jax.flow.block import Affine, FlowBlock
from tarflow_jax.flow.conditioning import UNCONDITIONAL, Conditioning
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.inverse import BlockInverse, Inversion
from tarflow_jax.flow.tarflow import TarFlow, inverse
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
    "UNCONDITIONAL",
    "Affine",
    "BlockInverse",
    "Conditioning",
    "FlowBlock",
    "Inversion",
    "KVCache",
    "Kernels",
    "TarFlow",
    "TarFlowConfig",
    "TransformerLayer",
    "block_orders",
    "cast_kernels",
    "from_tokens",
    "inverse",
    "order_within",
    "permute",
    "to_tokens",
    "unpermute",
    "without_padding",
]
