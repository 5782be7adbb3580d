"""The page of a report: sections of what `report_workdir` has read."""

import base64
import datetime
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from launch.report_charts import chart
from launch.report_html import document, element, facts, folded, section, table, text_of
from launch.report_workdir import Picture, Run
from tarflow_jax.likelihood import LOG_2PI
from tarflow_jax.runtime import release

MAX_STARTS = 10
_BRIEF = ("data_set", "split", "num_samples", "seed")  # of a protocol, shown without a click
_STYLE = Path(__file__).with_name("report.css").read_text()
_SCRIPT = Path(__file__).with_name("report.js").read_text()
_CHARTS = (
    (
        "Loss",
        "In nats per dimension, less ½ log 2π: ½ z² less log_det, of the noisy images that it is trained on.",
        {"loss": "training", "test_loss": "test split"},
    ),
    (
        "Terms of the loss",
        "Latents that are standard normal have ½ z² = ½.",
        {"half_mean_z2": "½ z²", "log_det_per_dim": "log_det per dimension"},
    ),
    (
        "Norms by block",
        "Root mean square of each block's output; a trained flow's last block comes to 1.",
        {"block_norms/": "block "},
    ),
    ("Loss by noise level", "Of each quarter of the noise levels, from low to high.", {"level_losses/": "quarter "}),
    ("Gradient norm", "Before clipping.", {"grad_norm": "norm"}),
    ("Learning rate", "Of the optimizer's schedule.", {"learning_rate": "rate"}),
    ("Speed", "Of training steps alone.", {"images_per_second": "images/s"}),
)


def page(run: Run) -> str:
    """The HTML, which loads nothing: a policy in its head forbids that, and any script but the page's own."""
    policy = f"default-src 'none'; img-src data:; style-src {_hash(_STYLE)}; script-src {_hash(_SCRIPT)}"
    body = [_head(run), _samples(run), _previews(run), _trajectory(run), _curves(run)]
    body += [_evaluations(run), _recipe(run), _machine(run), _notes(run)]
    return document(body, f"{run.name} · TarFlow", _STYLE, _SCRIPT, policy)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _head(run: Run) -> ET.Element:
    config, model = run.recipe.config, run.recipe.model
    height, width, channels = model.image_shape
    classes = f"{model.num_classes} classes" if model.num_classes else "no classes"
    about = f"A TarFlow of {config.data.source}: images {height} x {width} x {channels}, {classes}"
    steps, planned = _last_step(run), config.train.num_steps
    figures = {
        "steps": text_of(steps) if steps == planned else f"{text_of(steps)} of {text_of(planned)}",
        "parameters": text_of(run.num_parameters),
        "time in steps": _duration(run),
    }
    loss = next((value for name, value in run.results.items() if name.startswith("test loss")), None)
    if isinstance(loss, float):
        figures |= {"test loss, nats/dim": f"{loss:.4f}", "nats/dim of noisy data": f"{loss + LOG_2PI / 2:.4f}"}
    tiles = [element("div", element("dt", name), element("dd", value)) for name, value in figures.items() if value]
    names = element("p", f"Classes: {', '.join(run.classes)}", class_="faint") if run.classes else None
    return element("header", element("h1", run.name), element("p", about), element("dl", *tiles, class_="tiles"), names)


def _last_step(run: Run) -> int:
    return max((points[-1][0] for points in run.series.values()), default=0)


def _duration(run: Run) -> str | None:
    """Of all steps, by the speeds that were logged; without compilation, previews, evaluations and checkpoints."""
    seconds, before = 0.0, 0
    for step, rate in run.series.get("images_per_second", ()):
        if rate > 0:
            seconds, before = seconds + max(step - before, 0) * run.recipe.config.train.batch_size / rate, step
    if not seconds:
        return None
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _figure(picture: Picture, caption: str) -> ET.Element:
    size = {"width": picture.width, "height": picture.height}
    return element("figure", element("img", src=picture.uri, alt=picture.name, **size), element("figcaption", caption))


def _samples(run: Run) -> ET.Element | None:
    weight = run.recipe.config.sample.guidance.weight
    captions = {
        "samples_guided": f"Guided with weight {text_of(weight)}; denoised where the training noise was Gaussian.",
        "samples_denoised": "Denoised, without guidance.",
        "samples_raw": "As they come from the flow, without guidance.",
    }
    found = [_figure(run.pictures[name], caption) for name, caption in captions.items() if name in run.pictures]
    return section("Samples", element("div", *found, class_="pictures")) if found else None


def _previews(run: Run) -> ET.Element | None:
    if not run.previews:
        return None
    frames = [_figure(picture, picture.name) for picture in run.previews]
    slider = element("input", type="range", min=0, value=0, hidden="", aria_label="step") if frames[1:] else None
    return section(
        "Over the steps", element("div", slider, *frames, class_="slider one" if slider is not None else "one")
    )


def _trajectory(run: Run) -> ET.Element | None:
    if "trajectory" not in run.pictures:
        return None
    caption = "A column an image: its latents at the top, then the image after each block that is inverted."
    return section("From latents to images", element("div", _figure(run.pictures["trajectory"], caption), class_="one"))


def _curves(run: Run) -> ET.Element | None:
    drawn = []
    for title, caption, names in _CHARTS:
        curves = {}
        for metric, name in names.items():
            if metric.endswith("/"):
                found = [key for key in run.series if key.startswith(metric)]
                curves |= {name + key.removeprefix(metric): run.series[key] for key in found}
            else:
                curves[name] = run.series.get(metric, [])
        drawn.append(chart(title, caption, curves))
    drawn = [figure for figure in drawn if figure is not None]
    return section("Curves", element("div", *drawn, class_="charts")) if drawn else None


def _evaluations(run: Run) -> ET.Element | None:
    parts = []
    for name, content in run.evaluations.items():
        protocol, results, machine = (_mapping(content.get(key)) for key in ("protocol", "results", "environment"))
        parts.append(element("h3", name.split("-")[0].removesuffix(".json").replace("+", ", ")))
        brief = (f"{key} {text_of(protocol[key])}" for key in _BRIEF if key in protocol)
        parts.append(element("p", ", ".join(brief), class_="faint"))
        for metric, found in results.items():
            rows = [_mapping(row) for row in (found if isinstance(found, list) else [found])]
            parts += [element("p", metric)] if len(results) > 1 else []
            parts.append(table([{key: v for key, v in row.items() if not isinstance(v, list)} for row in rows]))
        parts += [folded("Protocol", facts(protocol))] if protocol else []
        parts += [folded("Machine and versions", facts(machine))] if machine else []
    return section("Evaluation", *parts)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _recipe(run: Run) -> ET.Element | None:
    groups = json.loads(run.recipe.to_json())
    return section("Recipe", *(folded(name, facts(fields)) for name, fields in groups.items()))


def _machine(run: Run) -> ET.Element | None:
    here = release()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made = f"This page was made at {now} by tarflow_jax {here['tarflow_jax']}, commit {text_of(here['commit'])}."
    if not run.starts:
        return section("Machine and versions", element("p", f"The run did not record its own. {made}"))
    shown = run.starts[:1] + run.starts[1:][-(MAX_STARTS - 1) :]
    parts = [folded(_start_title(start), facts(start), open_=i == 0) for i, start in enumerate(shown)]
    if left := len(run.starts) - len(shown):
        parts.insert(1, element("p", f"{left} more starts", class_="faint"))
    return section("Machine and versions", *parts, element("p", made, class_="faint"))


def _start_title(start: Mapping[str, Any]) -> str:
    step = start.get("step")
    return f"{f'continued after step {text_of(step)}' if step else 'begun'}, {text_of(start.get('time'))}"


def _notes(run: Run) -> ET.Element | None:
    return section("Left out", element("ul", *(element("li", note) for note in run.notes))) if run.notes else None
