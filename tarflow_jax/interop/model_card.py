"""The README.md of a model folder: what the model is, how it was trained, how good it is, and how to use it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tarflow_jax.errors import UserError
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.noise import Noise

FIELDS = ("name", "datasets", "training", "metrics", "samples", "evaluations")
PICTURE = "samples.png"  # beside the card
_MAX_CELL = 300  # letters
_PRIVATE = "model"  # of a protocol: a path on the machine that measured


def model_card(config: TarFlowConfig, noise: Noise | None, card: Mapping[str, Any]) -> str:
    """Markdown with the hub's YAML header.

    Args:
      noise: what it was trained with; None if unknown.
      card: any of "name" (str), "datasets" (list of str), "training" (dict: what to say of it, in words or
        numbers), "metrics" (dict: name, with its unit, -> measured number), "samples" (path of an image file, which
        is shown) and "evaluations" (list of what launch.evaluate writes, {"protocol": …, "results": …}); ValueError
        for another field.
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
        "shape": config.summary,
        "training noise": str(noise) if noise else "unknown",
    }
    training = {"data": ", ".join(datasets)} if datasets else {}
    sections = [
        f"\n![Samples]({PICTURE})\n" if card.get("samples") else "",
        _use(config, noise),
        _facts("Model", shape),
        _facts("Training", training | dict(card.get("training", {}))),
        _facts("Measured", card.get("metrics", {})),
        *map(_evaluation, card.get("evaluations", ())),
    ]
    # JSON values are YAML.
    yaml = "".join(f"{key}: {json.dumps(value)}\n" for key, value in header.items())
    return f"---\n{yaml}---\n\n# {_cell(name)}\n\n{_INTRODUCTION}{''.join(sections)}"


def _facts(title: str, rows: Mapping[str, Any]) -> str:
    return f"\n## {title}\n\n{_table(['', ''], [[key, value] for key, value in rows.items()])}" if rows else ""


def _evaluation(found: Mapping[str, Any]) -> str:
    """Each metric's table, and the protocol that says what it may be compared with."""
    results, protocol = found["results"], {k: v for k, v in found["protocol"].items() if k != _PRIVATE}
    text = ""
    for metric, rows in results.items():
        of_metric = [row for row in (rows if isinstance(rows, list) else [rows]) if isinstance(row, Mapping)]
        columns = list(dict.fromkeys(k for row in of_metric for k, v in row.items() if not isinstance(v, list)))
        if columns:
            text += f"\n### {_cell(metric)}\n\n" + _table(
                columns, [[row.get(k, "") for k in columns] for row in of_metric]
            )
    flat = [[name, value] for name, value in protocol.items() if not isinstance(value, Mapping)]
    nested = [(name, value) for name, value in protocol.items() if isinstance(value, Mapping)]
    flat += [[f"{name}, {inner}", leaf] for name, value in nested for inner, leaf in value.items()]
    return text and f"{text}\n<details><summary>Protocol</summary>\n\n{_table(['', ''], flat)}\n</details>\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(value: Any) -> str:
    """A value as Markdown that shows it: in one line, no markup in it."""
    text = " ".join((f"{value:.5g}" if isinstance(value, float) else str(value)).split())[:_MAX_CELL]
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("[", "\\[").replace("`", "\\`")


def _use(config: TarFlowConfig, noise: Noise | None) -> str:
    """An example that runs as it stands, for this model."""
    labels, guidance, level = "", "", ""
    if config.num_classes:
        labels, guidance = ", labels", ", guidance=Guidance(weight=1.0)"
    if config.noise_conditional:
        level = f", noise_std={noise.std_min:g}" if noise else ", noise_std=0.1"
    return _USE.format(
        imports="Guidance, " if guidance else "",
        define=f"labels = [i % {config.num_classes} for i in range(16)]\n" if labels else "",
        labels=labels,
        guidance=guidance,
        level=level,
    )


_INTRODUCTION = """\
A TarFlow ("Normalizing Flows are Capable Generative Models", arXiv 2412.06329): a normalizing flow made of
autoregressive transformer blocks, with an exact likelihood and an exact inverse.
"""

_USE = """
## Use

```python
import jax
from tarflow_jax import {imports}TarFlowPipeline

pipe = TarFlowPipeline.from_pretrained("path/of/this/folder")  # or its name on the hub
{define}images = pipe.sample(jax.random.key(0), 16{labels}{guidance})  # float32 [16, H, W, K]
latents, log_det = pipe.encode(images{labels}{level})
print(pipe.log_prob(images{labels}{level}))  # nats
```
"""
