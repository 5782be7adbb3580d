"""The shape of a flow, validated when it is constructed."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from tarflow_jax.errors import UserError
from tarflow_jax.options import Options, option, required

REMAT_POLICIES = ("none", "full")


@dataclasses.dataclass(frozen=True)
class TarFlowConfig(Options):
    """Everything that determines a TarFlow's parameters and arithmetic.

    Parameters, the residual stream, softmax, norms, the affine map and log_det are float32 whatever `dtype` is.
    `noise_conditional` is "Normalizing Flows with Iterative Denoising" (arXiv 2604.20041). `input_limit` keeps an
    outlier in one block from growing in the next ones, which makes training with small batches diverge. `image_limit`
    does the same for samples that overshoot the training range; set it to 1 plus a few standard deviations of the
    noise. `triangular` adds D (D - 1) / 2 outputs per token, so it suits small patches. The options from `start_token`
    on are STARFlow's (arXiv 2506.06276); each works on its own.
    """

    group: ClassVar[str] = "model"

    image_size: tuple[int, int] = option((0, 0), "Height and width; one number for a square.")
    image_channels: int = option(0, "Channels of an image, such as 1 or 3.")
    patch_size: int = option(0, "Side of the square patches that become tokens.")
    width: int = required("Width of the residual stream.", low=1)
    num_blocks: int = required("Number of autoregressive flow blocks.", low=1)
    layers_per_block: int | tuple[int, ...] = required("Transformer layers per block; one number for all.", low=1)
    num_classes: int = option(0, "Number of classes; 0 for an unconditional model.")
    volume_preserving: bool = option(False, "Volume-preserving flow (VP) with a learned prior variance, not NVP.")
    head_dim: int = option(64, "Width of an attention head; must divide the model's width.", low=1)
    dtype: str = option("float32", "Dtype of the matmuls.", choices=("float32", "bfloat16"))
    remat: str = option("none", "Layers that the backward pass recomputes.", choices=REMAT_POLICIES)
    attention: str = option("auto", "Attention kernel.", choices=("auto", "plain", "cudnn", "splash"))
    position_init: str = option(
        "normal", "Position embeddings: random, sines, or none.", choices=("normal", "grid", "none")
    )
    rotary: bool = option(False, "Rotary position embeddings (RoPE) by row and column of a patch.")
    input_limit: float = option(0.0, "Clips the inputs of all blocks but the first to ± this; 0 for no limit.")
    image_limit: float = option(0.0, "Clips the inputs of the first block to ± this; 0 for no limit.")
    triangular: bool = option(False, "Affine maps with triangular matrices instead of diagonal ones.")
    noise_conditional: bool = option(False, "One flow for all noise levels, conditioned on the level.")
    image_bits: int = option(8, "Bits per channel of a pixel; 0 for an autoencoder's latents.", choices=(0, 8, 16))
    sequence_shape: tuple[int, int] = option(
        (0, 0), "Tokens per sequence and dimensions per token; 0 dimensions for scalar tokens."
    )
    condition_dim: int = option(0, "Dimension of the condition; 0 for none.")
    condition_kind: str = option(
        "vector", "One condition per example, one per token, or a prefix.", choices=("vector", "tokens", "prefix")
    )
    orders: str = option(
        "alternate", "Order in which blocks read the tokens.", choices=("alternate", "backwards_first", "random")
    )
    condition_length: int = option(0, "Length of the prefix; 0 for other conditions.")
    condition_blocks: int = option(0, "Blocks that see the condition, counted from the latents; 0 for all.")
    start_token: bool = option(False, "Prepends a learned token, so that the first token is transformed too.")
    scale_function: str = option("exp", "Function that makes a block's scales positive.", choices=("exp", "softplus"))
    output_limit: float = option(0.0, "Limits a block's outputs to ± this with tanh; 0 for no limit.")
    final_norm: bool = option(False, "RMSNorm before a block's output projection.")
    rotary_base_size: int = option(
        0, "Rotary embeddings by position in block order, scaled to a square of this side; 0 for by patch."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (*self.image_size, self.image_channels, self.patch_size)
        if any(sizes) if self.is_sequence else not all(sizes):
            raise UserError(
                "a flow needs image_size, image_channels and patch_size, for images, or sequence_shape, for sequences; "
                f"these are {self.image_size}, {self.image_channels}, {self.patch_size} and {self.sequence_shape}"
            )
        if not self.is_sequence and any(side % self.patch_size for side in self.image_size):
            size = "x".join(map(str, self.image_size))
            raise UserError(f"image_size {size} is not divisible by patch_size {self.patch_size}")
        if self.is_sequence and self.volume_preserving:
            raise UserError("volume_preserving is for images; leave it False with sequence_shape")
        if self.width % self.head_dim:
            raise UserError(f"width {self.width} is not a multiple of head_dim {self.head_dim}")
        if len(self.depths) != self.num_blocks:
            raise UserError(f"layers_per_block lists {len(self.depths)} blocks, but num_blocks is {self.num_blocks}")
        if (self.rotary and self.head_dim % 4) or (self.position_init == "grid" and self.width % 4):
            raise UserError("rotary needs a head_dim, and position_init 'grid' a width, that is a multiple of 4")
        if bool(self.condition_length) != self.has_prefix:
            raise UserError(
                f"condition_length is {self.condition_length} with condition_dim {self.condition_dim} of kind "
                f"{self.condition_kind!r}; a 'prefix' has both, other kinds have no length"
            )

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of each block."""
        if isinstance(self.layers_per_block, int):
            return (self.layers_per_block,) * self.num_blocks
        return self.layers_per_block

    @property
    def summary(self) -> str:
        """Describes the shape: "4 blocks of 2 layers, patch 4, width 128"."""
        layers = " + ".join(map(str, self.depths)) if len(set(self.depths)) > 1 else str(self.depths[0])
        tokens = f"{self.num_tokens} tokens" if self.is_sequence else f"patch {self.patch_size}"
        return f"{self.num_blocks} blocks of {layers} layers, {tokens}, width {self.width}"

    @property
    def is_sequence(self) -> bool:
        """Whether the data are sequences, not images."""
        return self.sequence_shape[0] > 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, K)."""
        return (*self.image_size, self.image_channels)

    @property
    def random_orders(self) -> bool:
        return self.orders == "random"

    @property
    def position_embeddings(self) -> bool:
        return self.position_init != "none"

    @property
    def condition_by_token(self) -> bool:
        return self.condition_kind == "tokens" and self.condition_dim > 0

    @property
    def has_prefix(self) -> bool:
        return self.condition_kind == "prefix" and self.condition_dim > 0

    @property
    def standardizes_condition(self) -> bool:
        """Whether the flow has a condition that it standardises; a prefix is not standardised."""
        return self.condition_dim > 0 and not self.has_prefix

    def is_conditioned(self, k: int) -> bool:
        """Whether block number k sees the condition."""
        return self.condition_dim > 0 and (not self.condition_blocks or k >= self.num_blocks - self.condition_blocks)

    def prefix_length(self, k: int) -> int:
        """Length of the prefix that block number k sees."""
        return self.condition_length if self.is_conditioned(k) else 0

    @property
    def condition_shape(self) -> tuple[int, ...]:
        """(C,), (T, C) for one condition per token, or (L, C) for a prefix."""
        lengths = {"vector": (), "tokens": (self.num_tokens,), "prefix": (self.condition_length,)}
        return (*lengths[self.condition_kind], self.condition_dim)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """(H, W, K) of an image, (T, D) of a sequence, or (T,) of one with scalar tokens."""
        if not self.is_sequence:
            return self.image_shape
        return self.sequence_shape if self.sequence_shape[1] else self.sequence_shape[:1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens; a sequence is one column."""
        if self.is_sequence:
            return self.sequence_shape[0], 1
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """T, the patches of an image or the tokens of a sequence."""
        return self.grid[0] * self.grid[1]

    @property
    def sequence_length(self) -> int:
        """Length of the sequence that a block reads, start token included."""
        return self.num_tokens + self.start_token

    @property
    def token_dim(self) -> int:
        """D, the dimension of a token."""
        return max(self.sequence_shape[1], 1) if self.is_sequence else self.patch_size**2 * self.image_channels

    @property
    def output_dim(self) -> int:
        """Outputs of a block per token: a log-scale and a shift of each of its values; in VP mode the shift alone."""
        return self.token_dim * (1 if self.volume_preserving else 2)

    @property
    def triangle_size(self) -> int:
        """D (D - 1) / 2, the entries below the diagonal of a [D, D] matrix."""
        return self.token_dim * (self.token_dim - 1) // 2

    @property
    def num_dims(self) -> int:
        """T D, the dimension of an image or a sequence."""
        return self.num_tokens * self.token_dim

    @property
    def num_heads(self) -> int:
        """N, the attention heads of a layer."""
        return self.width // self.head_dim

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)
