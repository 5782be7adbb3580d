"""The README.md of a model folder: what the model is, how it was trained, and how to use it."""

import json
from collections.abc import Mapping
from typing import Any

from tarflow_jax.errors import UserError
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.noise import Noise

FIELDS = ("name", "datasets", "training", "metrics")


def model_card(config: TarFlowConfig, noise: Noise | None, card: Mapping[str, Any]) -> str:
    """Markdown with the hub's YAML header.

    Args:
      noise: what it was trained with; None if unknown.
      card: any of "name" (str), "datasets" (list of str), "training" (dict: what to say of it, in words or
        numbers) and "metrics" (dict: name, with its unit, -> measured number); ValueError for another field.
    """
    if unknown := sorted(set(card) - set(FIELDS)):
        raise UserError(f"unknown model card field {unknown[0]!r}; expected one of {', '.join(FIELDS)}")
    name, datasets = card.get("name", "TarFlow"), list(card.get("datasets", ()))
    header = {
        "library_name": "tarflow_jax",
        "pipeline_tag": "image-generation" if config.num_classes else "unconditional-image-generation",
        "tags": ["tarflow", "normalizing-flow", "jax", "flax", *(["class-conditional"] if config.num_classes else [])],
        **({"datasets": datasets} if datasets else {}),
    }
    classes = f"conditional on {config.num_classes} classes" if config.num_classes else "unconditional"
    height, width = config.image_size
    shape = {
        "images": f"{height} x {width}, {config.image_channels} channel(s), values in [-1, 1]",
        "flow": f"{'volume-preserving' if config.volume_preserving else 'affine'}"
        f"{', triangular' if config.triangular else ''}, {classes}",
        "shape": f"patch {config.patch_size}, width {config.width}, {config.num_blocks} blocks of"
        f" {config.layers_per_block} layers",
        "training noise": str(noise) if noise else "unknown",
    }
    training = {"data": ", ".join(datasets)} if datasets else {}
    sections = [
        _table("Model", shape),
        _table("Training", training | dict(card.get("training", {}))),
        _table("Measured", card.get("metrics", {})),
    ]
    # JSON values are YAML.
    yaml = "".join(f"{key}: {json.dumps(value)}\n" for key, value in header.items())
    return f"---\n{yaml}---\n\n# {name}\n\n{_INTRODUCTION}{''.join(sections)}{_USE}"


def _table(title: str, rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    lines = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    return f"\n## {title}\n\n| | |\n| --- | --- |\n{lines}"


_INTRODUCTION = """\
A TarFlow ("Normalizing Flows are Capable Generative Models", arXiv 2412.06329): a normalizing flow made of
autoregressive transformer blocks, with an exact likelihood and an exact inverse.
"""

_USE = """
## Use

```python
import jax
from tarflow_jax import TarFlowPipeline

pipe = TarFlowPipeline.from_pretrained("path/of/this/folder")
images = pipe.sample(jax.random.key(0), 16, None)  # [-1, 1], float32 [16, H, W, K]
```
"""
