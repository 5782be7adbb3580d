"""The flow, in pure Flax linen: data to latents and back. Independent of training, files and devices."""

from tarflow_jax.flow.block import Affine, FlowBlock
from tarflow_jax.flow.conditioning import UNCONDITIONAL, Conditioning
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.inverse import BlockInverse, Inversion
from tarflow_jax.flow.tarflow import TarFlow, inverse
from tarflow_jax.flow.tokens import (
    block_orders,
    from_tokens,
    permute,
    to_tokens,
    unpermute,
    without_padding,
)
from tarflow_jax.flow.transformer import Kernels, cast_kernels

__all__ = [
    "UNCONDITIONAL",
    "Affine",
    "BlockInverse",
    "Conditioning",
    "FlowBlock",
    "Inversion",
    "Kernels",
    "TarFlow",
    "TarFlowConfig",
    "block_orders",
    "cast_kernels",
    "from_tokens",
    "inverse",
    "permute",
    "to_tokens",
    "unpermute",
    "without_padding",
]
