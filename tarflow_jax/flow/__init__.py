"""The flow: images <-> latents, in pure Flax linen. Knows nothing of data, training, files or devices."""

from tarflow_jax.flow.block import Affine, FlowBlock
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.tarflow import TarFlow, updated_prior
from tarflow_jax.flow.tokens import is_reversed, permute, to_images, to_tokens
from tarflow_jax.flow.transformer import Kernels, KVCache, TransformerLayer, cast_kernels

__all__ = [
    "Affine",
    "FlowBlock",
    "KVCache",
    "Kernels",
    "TarFlow",
    "TarFlowConfig",
    "TransformerLayer",
    "cast_kernels",
    "is_reversed",
    "permute",
    "to_images",
    "to_tokens",
    "updated_prior",
]
