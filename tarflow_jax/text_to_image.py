"""Images from captions: a text encoder, a flow over latents, and the autoencoder of these latents.

pipe = TextToImage.from_pretrained("runs/emoji64_text")
images = pipe("a red heart", num_images=4)
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from etils import epath

from tarflow_jax import interop
from tarflow_jax.autoencoder import Autoencoder
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import write_text
from tarflow_jax.interop.model_folder import TEXT_TO_IMAGE, local_target
from tarflow_jax.options import shown
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance
from tarflow_jax.text import TextEncoder, open_text_encoder
from tarflow_jax.training import Recipe

FORMAT = "tarflow_jax text to image 1"


class TextToImage:
    """Draws images [B, H, W, K] from captions or, if the flow has classes, from labels.

    Attributes:
      flow: models latents [B, h, w, Z] of `autoencoder`.
      autoencoder: decodes the latents.
      text: encodes captions as [B, L, E]; None for a flow without a prefix, or if calls pass embeddings.
      guidance: default guidance of a call.
    """

    def __init__(
        self,
        flow: TarFlowPipeline,
        autoencoder: Autoencoder,
        text: TextEncoder | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        """Raises ValueError if the parts do not fit together."""
        if flow.config.image_channels != autoencoder.config.latent_channels or flow.config.is_sequence:
            raise UserError(
                f"the flow is of {flow.config.data_shape}, the autoencoder's latents have "
                f"{autoencoder.config.latent_channels} channels; expected a flow of these latents"
            )
        if text and (text.length, text.dim) != flow.config.condition_shape:
            found = f"{text.length} embeddings of {text.dim}"
            raise UserError(f"the text encoder makes {found}, the flow's prefix is {flow.config.condition_shape}")
        self.flow, self.autoencoder, self.text, self.guidance = flow, autoencoder, text, guidance

    @property
    def denoises(self) -> bool:
        """Whether the flow's latents have more noise than the decoder has learned to remove."""
        return (self.flow.noise_std or 0) > self.autoencoder.config.noise_std

    @classmethod
    def from_pretrained(cls, name: epath.PathLike, **options: Any) -> Self:
        """Loads what `save_pretrained` wrote, a model of the hub, or the workdir of a flow over packed latents.

        `options` and errors are those of `TarFlowPipeline.from_pretrained`.
        """
        root = name if _is_workdir(name) else interop.local_folder(name)
        return cls.from_flow(TarFlowPipeline.from_pretrained(root, **options), root)

    @classmethod
    def from_flow(cls, flow: TarFlowPipeline, name: epath.PathLike) -> Self:
        """Adds to a flow the autoencoder and text encoder stored under `name`. Raises as `from_pretrained`."""
        if _is_workdir(name):
            config = Recipe.from_workdir(name).config
            kind, _, folder = config.data.source.partition(":")
            if kind != "latents":
                raise UserError(f"this flow was trained on {config.data.source}; expected latents:FOLDER")
            root, guidance = Path(folder).expanduser(), Guidance(**config.sample.guidance)
        else:
            root = interop.local_folder(name)
            try:
                fields = json.loads((root / TEXT_TO_IMAGE).read_bytes())
                if fields["format"] != FORMAT:
                    raise UserError(f"its format is {fields['format']}; expected {FORMAT}")
                guidance = Guidance.from_dict(fields["guidance"])
            except FileNotFoundError:
                raise UserError(f"{name} is a flow alone, without autoencoder and text encoder") from None
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{root / TEXT_TO_IMAGE}: {one_line(error)}") from None
        text = open_text_encoder(root / "text") if flow.config.has_prefix else None
        return cls(flow, Autoencoder.from_pretrained(root / "autoencoder"), text, guidance)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Writes a folder of all parts, from which `TarFlowPipeline` can load the flow alone.

        `options` are those of `TarFlowPipeline.save_pretrained`.
        """
        config, weights = self.autoencoder.config, sum(leaf.size for leaf in jax.tree.leaves(self.autoencoder.params))
        sides = [str(side * config.factor) for side in self.flow.config.image_size]
        shape = " x ".join([*sides, str(config.image_channels)])
        parts = {"autoencoder": f"images {shape}, {weights / 1e6:.2f} million weights"}
        if self.text:
            parts["text encoder"] = f"{self.text.length} embeddings of {self.text.dim} a caption"
        card = {"parts": parts, **(options.get("card") or {})}
        fields = {"format": FORMAT, "guidance": (self.guidance or Guidance()).to_dict()}
        with local_target(folder) as target:
            self.flow.save_pretrained(target, **options | {"card": card})
            self.autoencoder.save_pretrained(target / "autoencoder", dtype=options.get("dtype", "float32"))
            if self.text:
                self.text.save(target / "text")
            write_text(target / TEXT_TO_IMAGE, json.dumps(fields) + "\n")

    def push_to_hub(self, name: str, *, private: bool = False, token: str | None = None, **options: Any) -> str:
        """Saves all parts to the Hugging Face hub; see `TarFlowPipeline.push_to_hub`."""
        return interop.push_model(self.save_pretrained, name, private=private, token=token, **options)

    def __call__(
        self,
        prompts: str | Sequence[str] | np.ndarray | jax.Array | None = None,
        num_images: int = 1,
        guidance: Guidance | None = None,
        key: jax.Array | None = None,
        *,
        labels: Any = None,
        decoder: Any = None,
        denoise: bool | None = None,
    ) -> jax.Array:
        """Draws images.

        Args:
          prompts: a caption, several, or their embeddings, float [B, L, E]; None for a flow without captions.
          num_images: images per caption, or in total without captions.
          guidance: away from the empty caption; None is the model's default.
          key: for the latents; None is `jax.random.key(0)`.
          labels: int [B], of a flow with classes.
          decoder: see `TarFlowPipeline.decode`.
          denoise: apply Tweedie's formula to the latents; None is `denoises`.

        Returns:
          float32 [B, H, W, K] in about [-1, 1]; the images of one caption are consecutive.

        Raises:
          ValueError: captions for a flow without text, or none for one with text; or as in `TarFlowPipeline.sample`.
        """
        condition = None if prompts is None else np.repeat(self._embeddings(prompts), num_images, axis=0)
        if (condition is None) == self.flow.config.has_prefix:
            expected = "captions" if self.flow.config.has_prefix else "no captions"
            raise UserError(f"prompts are {shown(prompts)}; this flow was trained with {expected}")
        num_images = num_images if condition is None else len(condition)
        latents = self.flow.sample(
            jax.random.key(0) if key is None else key,
            num_images,
            labels,
            guidance or self.guidance,
            self.denoises if denoise is None else denoise,
            decoder=decoder,
            condition=condition,
            null_condition=None if self.text is None else self.text([""])[0],
        )
        return self.autoencoder.decode(latents)

    def _embeddings(self, prompts: Any) -> np.ndarray:
        if isinstance(prompts, np.ndarray | jax.Array):
            return np.asarray(prompts)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.text is None or not texts:
            raise UserError(f"{'no captions' if self.text else 'no text encoder'}; expected captions and an encoder")
        return self.text(texts)


def _is_workdir(name: epath.PathLike) -> bool:
    return (epath.Path(name) / "checkpoints").is_dir()
