"""The shape of a flow, checked once where it is made."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from tarflow_jax.errors import UserError

REMAT_POLICIES = ("none", "full")
KERNELS = ("auto", "plain", "cudnn", "splash")
DTYPES = ("float32", "bfloat16")
POSITION_INITS = ("normal", "grid")


@dataclasses.dataclass(frozen=True)
class TarFlowConfig:
    """Everything that determines a TarFlow's parameters and its arithmetic.

    Attributes:
      image_size: (height, width); a single number means a square.
      image_channels: 1 or 3 (any positive number works).
      patch_size: side of the square patches that become tokens.
      width: dimension of the transformer's residual stream.
      num_blocks: autoregressive flow blocks; their directions alternate.
      layers_per_block: transformer layers in a block, one int or one per block.
      num_classes: 0 for an unconditional model.
      noise_conditional: the flow is told the noise level σ of its images and is their density at every level
        ("Normalizing Flows with Iterative Denoising", arXiv 2604.20041).
      volume_preserving: VP flow (log_scale = 0, learned prior variance) instead of NVP.
      head_dim: dimension of an attention head; divides `width`.
      dtype: of the matrix products, "float32" or "bfloat16". Parameters, the residual stream,
        softmax, norms, the affine map and log_det are always float32.
      remat: what the backward pass recomputes in a layer: "none", "dots" (all but matrix products),
        "attention" (all but splash's results), "full".
      position_init: how a new model's position embeddings begin: "normal", as the reference's, or "grid", sines and
        cosines of a patch's row and column, from which attention learns in fewer steps to look at the row above.
      rotary: queries and keys are turned, half of a head's pairs by the patch's row and half by its column (`turn`), so
        that attention begins with a sense of distance.
      input_limit: c of clip(x, -c, c), by which tokens enter a transformer; 0 for none. An outlier of one block then
        makes no larger ones in the blocks behind it, which training by small batches does not survive.
      image_limit: that of the first block, which reads images. Samples overshoot the range that it was trained on (1
        and a few standard deviations of the noise), and from there on what it makes of them grows without bound.
      triangular: the affine map of a token has a triangular matrix, not a diagonal one: how its numbers depend on
        each other is a function of the tokens before it too. For small patches: D (D - 1) / 2 more outputs a token.
      attention: the kernel for whole sequences: "auto" (the platform's best), "plain", "cudnn" or "splash".

    Raises ValueError: one line naming the field, when the shape is impossible.
    """

    image_size: tuple[int, int]
    image_channels: int
    patch_size: int
    width: int
    num_blocks: int
    layers_per_block: int | tuple[int, ...]
    num_classes: int = 0
    volume_preserving: bool = False
    head_dim: int = 64
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    position_init: str = "normal"
    rotary: bool = False
    input_limit: float = 0
    image_limit: float = 0
    triangular: bool = False
    noise_conditional: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        sides = tuple(self.image_size)
        object.__setattr__(self, "image_size", sides * 2 if len(sides) == 1 else sides)  # (8,): a flag's one number
        if not isinstance(self.layers_per_block, int):
            object.__setattr__(self, "layers_per_block", tuple(self.layers_per_block))
        self._check()

    def _check(self) -> None:
        if len(self.image_size) != 2:
            raise UserError(f"image_size is {self.image_size}; expected one int or (height, width)")
        sizes = {
            "image_size": min(self.image_size),
            "image_channels": self.image_channels,
            "patch_size": self.patch_size,
            "width": self.width,
            "num_blocks": self.num_blocks,
            "layers_per_block": min(self.depths, default=0),
            "head_dim": self.head_dim,
            "num_classes": self.num_classes + 1,
        }
        for name, size in sizes.items():
            if size < 1:
                expected = "0 (no classes) or a positive number" if name == "num_classes" else "a positive number"
                raise UserError(f"{name} is {getattr(self, name)}; expected {expected}")
        for name in _NUMBERS:
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 (none) or a positive number")
        height, width = self.image_size
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"image_size {height}x{width} is not divisible by patch_size {self.patch_size}; "
                "choose a patch that divides both sides"
            )
        if self.width % self.head_dim:
            raise UserError(f"width {self.width} is not a multiple of head_dim {self.head_dim}; choose a width that is")
        if len(self.depths) != self.num_blocks:
            raise UserError(f"layers_per_block lists {len(self.depths)} blocks, but num_blocks is {self.num_blocks}")
        choices = {"dtype": DTYPES, "remat": REMAT_POLICIES, "attention": KERNELS, "position_init": POSITION_INITS}
        for name, valid in choices.items():
            if (value := getattr(self, name)) not in valid:
                raise UserError(f"{name} is {value!r}; expected one of {', '.join(valid)}")
        if self.position_init == "grid" and self.width % 4:
            raise UserError(f"width {self.width} is not a multiple of 4, as position_init 'grid' needs")
        if self.noise_conditional and self.width % 2:
            raise UserError(f"width {self.width} is odd; noise_conditional needs an even one")
        if self.rotary and self.head_dim % 4:
            raise UserError(f"head_dim {self.head_dim} is not a multiple of 4, as rotary needs")

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of each block, [F]."""
        if isinstance(self.layers_per_block, int):
            return (self.layers_per_block,) * self.num_blocks
        return self.layers_per_block

    @property
    def summary(self) -> str:
        """ "4 blocks of 2 layers, patch 4, width 128"; "1 + 1 + 1 + 5 layers" where blocks differ."""
        layers = " + ".join(map(str, self.depths)) if len(set(self.depths)) > 1 else str(self.depths[0])
        return f"{self.num_blocks} blocks of {layers} layers, patch {self.patch_size}, width {self.width}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, K)."""
        return (*self.image_size, self.image_channels)

    @property
    def num_tokens(self) -> int:
        """T, the patches of an image."""
        return (self.image_size[0] // self.patch_size) * (self.image_size[1] // self.patch_size)

    @property
    def token_dim(self) -> int:
        """D, the numbers in a patch."""
        return self.patch_size**2 * self.image_channels

    @property
    def triangle_size(self) -> int:
        """D (D - 1) / 2, the numbers below the diagonal of a [D, D] matrix."""
        return self.token_dim * (self.token_dim - 1) // 2

    @property
    def num_dims(self) -> int:
        """H W K = T D, the numbers in an image."""
        return self.num_tokens * self.token_dim

    @property
    def num_heads(self) -> int:
        """N."""
        return self.width // self.head_dim

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` is its inverse."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TarFlowConfig":
        """From a dictionary, as read from JSON; ValueError for unknown, missing or wrong fields."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in fields.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UserError(f"unknown model field {name!r}{hint}")
            _check_type(name, value)
        required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        if missing := sorted(required - set(fields)):
            raise UserError(f"model config lacks {', '.join(missing)}")
        return cls(**fields)


_STRINGS = ("dtype", "remat", "attention", "position_init")
_BOOLS = ("volume_preserving", "rotary", "triangular", "noise_conditional")
_NUMBERS = ("input_limit", "image_limit")
_LISTS = ("image_size", "layers_per_block")


def _check_type(name: str, value: Any) -> None:
    def is_int(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool)

    if name in _STRINGS:
        valid, expected = isinstance(value, str), "a string"
    elif name in _NUMBERS:
        valid, expected = is_int(value) or isinstance(value, float), "a number"
    elif name in _BOOLS:
        valid, expected = isinstance(value, bool), "true or false"
    elif name in _LISTS and isinstance(value, list | tuple):
        valid, expected = all(map(is_int, value)), "whole numbers"
    else:
        valid, expected = is_int(value), "a whole number"
    if not valid:
        raise UserError(f"model field {name} is {value!r}; expected {expected}")
