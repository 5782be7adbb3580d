"""The flow: images <-> latents, in pure Flax linen. Knows nothing of data, training, files or devices."""

from tarflow_jax.flow.block import Affine, FlowBlock, in_block_order, solve_unit_lower, unstack_layers
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.patches import to_images, to_tokens
from tarflow_jax.flow.permutation import permute
from tarflow_jax.flow.tarflow import TarFlow, updated_prior
from tarflow_jax.flow.transformer import Caches, KVCache, StackedCache, grown

__all__ = [
    "Affine",
    "Caches",
    "FlowBlock",
    "KVCache",
    "StackedCache",
    "TarFlow",
    "TarFlowConfig",
    "grown",
    "in_block_order",
    "permute",
    "solve_unit_lower",
    "to_images",
    "to_tokens",
    "unstack_layers",
    "updated_prior",
]
