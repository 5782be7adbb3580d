"""The shape of an autoencoder, validated when it is constructed."""

import dataclasses
import math
from typing import ClassVar

from tarflow_jax.errors import UserError
from tarflow_jax.options import Options, option


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(Options):
    """Everything that determines an autoencoder's parameters and arithmetic; the defaults are Stable Diffusion's."""

    group: ClassVar[str] = "autoencoder"

    image_channels: int = option(3, "Channels of an image, such as 1 or 3.", low=1)
    patch_size: int = option(1, "Side of the squares of pixels that become channels before the encoder.", low=1)
    latent_channels: int = option(4, "Channels of a latent.", low=1)
    block_out_channels: tuple[int, ...] = option(
        (128, 256, 512, 512), "Channels at each resolution, from the finest; the side halves in between.", low=1
    )
    layers_per_block: int = option(2, "Residual layers at each resolution; the decoder has one more.", low=1)
    norm_num_groups: int = option(32, "Groups of the group norms; must divide all channels.", low=1)
    mid_block_add_attention: bool = option(True, "Attention at the coarsest resolution.")
    use_quant_conv: bool = option(True, "A 1x1 convolution after the encoder.")
    use_post_quant_conv: bool = option(True, "A 1x1 convolution before the decoder.")
    scaling_factor: float = option(0.18215, "Latents are (z - shift_factor) * scaling_factor.")
    shift_factor: float = option(0.0, "Subtracted from latents before they are scaled.", low=-math.inf)
    latent_std: float = option(0.0, "Constant standard deviation of the encoder's z; 0 for a learned one.")
    noise_std: float = option(0.0, "Noise σ of latents, in the flow's units, that the decoder learned to remove.")
    dtype: str = option("float32", "Dtype of convolutions; norms are float32.", choices=("float32", "bfloat16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = self.block_out_channels
        if not widths:
            raise UserError("autoencoder.block_out_channels is empty; expected channels of at least one resolution")
        if any(width % self.norm_num_groups for width in widths):
            raise UserError(f"norm_num_groups is {self.norm_num_groups}; expected a divisor of {widths}")
        if not self.scaling_factor:
            raise UserError("autoencoder.scaling_factor is 0; expected a positive number, 1 for latents as they are")

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)

    @property
    def patch_channels(self) -> int:
        """Numbers of a patch."""
        return self.image_channels * self.patch_size**2
