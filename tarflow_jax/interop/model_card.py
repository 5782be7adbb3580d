"""Renders the model card, README.md of a model folder: the model, its use, its training and its measurements."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from tarflow_jax.errors import UserError
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.noise import Noise

FIELDS = ("name", "datasets", "training", "metrics", "samples", "evaluations", "parts")
PICTURE = "samples.png"  # beside the card
_MAX_CELL_CHARACTERS = 300
_PRIVATE = "model"  # left out of protocols: a path on the machine that ran the evaluation

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


def model_card(config: TarFlowConfig, noise: Noise | None, card: Mapping[str, Any]) -> str:
    """Returns a model card: Markdown with the hub's YAML header.

    `card` has any of "name" (str), "datasets" (list of str), "training" (dict: facts to show, words or numbers),
    "metrics" (dict: name with its unit -> measured number), "samples" (path of an image file to show), "evaluations"
    (list of launch.evaluate's outputs, {"protocol": …, "results": …}) and "parts" (dict: "autoencoder" and perhaps
    "text encoder" of a flow over latents -> description); raises ValueError for others.
    """
    # Imported here, since only saving needs them.
    import jinja2
    from huggingface_hub import ModelCardData

    if unknown := sorted(set(card) - set(FIELDS)):
        raise UserError(f"unknown model card field {unknown[0]!r}; expected one of {', '.join(FIELDS)}")
    classes = config.num_classes
    task = "image-generation" if classes else "unconditional-image-generation"
    if "text encoder" in card.get("parts", ()):
        task = "text-to-image"
    tag, datasets = None if config.is_sequence else task, list(card.get("datasets", ())) or None
    tags = ["tarflow", "normalizing-flow", "jax", "flax", *(["class-conditional"] if classes else [])]
    header = ModelCardData(library_name="tarflow_jax", pipeline_tag=tag, tags=tags, datasets=datasets)
    evaluations = [found for found in map(_evaluation, card.get("evaluations", ())) if found["tables"]]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = _cell
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        header=header.to_yaml(), config=config, noise=noise, card=card, picture=PICTURE, evaluations=evaluations
    )


def _evaluation(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a table for each metric, and the protocol as rows."""
    tables = {}
    for metric, results in found["results"].items():
        rows = [row for row in (results if isinstance(results, list) else [results]) if isinstance(row, Mapping)]
        columns = list(dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, list)))
        if columns:
            tables[metric] = columns, [[row.get(k, "") for k in columns] for row in rows]
    protocol = {name: value for name, value in found["protocol"].items() if name != _PRIVATE}
    return {"tables": tables, "protocol": flatten_dict(protocol, sep=", ").items()}


def _cell(value: Any) -> str:
    """Formats a value as one line of Markdown, escaped."""
    text = " ".join((f"{value:.5g}" if isinstance(value, float) else str(value)).split())[:_MAX_CELL_CHARACTERS]
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("[", "\\[").replace("`", "\\`")
