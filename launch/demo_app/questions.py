"""The tabs that ask: about an image, and the way between two."""

import itertools
from collections.abc import Iterator
from typing import Any

import gradio as gr
import jax
import numpy as np

from launch.demo_app.model import NO_CLASS, DemoModel, Drawn
from launch.demo_app.widgets import EVENT, PROGRESS, TILE, film, gallery, messages, picture, upload
from tarflow_jax.evaluation.generation import quantise
from tarflow_jax.figures import COLOURS, enlarge, overlay, to_pil, to_uint8
from tarflow_jax.inspection import Inspection, Progress, inspect, interpolate

SIDE = 448  # of a picture that stands alone, pixels
STEPS = 8  # of an interpolation
NUM_EXAMPLES = 6


def tabs(model: DemoModel, page: gr.Blocks, first: Drawn) -> None:
    """Both tabs; `first` are the samples that a visitor without an image is offered."""
    with gr.Tab("Ask"):
        _ask_tab(model, page, first)
    with gr.Tab("Interpolate"):
        _interpolate_tab(model, first)


def _ask_tab(model: DemoModel, page: gr.Blocks, first: Drawn) -> None:
    gr.Markdown("Of any image: its exact log p(x), the patches that cost most, its class by Bayes' rule, its latents.")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image = upload("An image")
            own = gallery("None at hand? Take one that the model drew", NUM_EXAMPLES, allow_preview=False, buttons=[])
            conditions = _conditions(model)
            classes = gr.Label(label="Class probabilities", visible=bool(model.pipe.config.num_classes))
        with gr.Column(scale=5, min_width=300):
            figures = gr.HTML()
            with gr.Row():
                pictures = [picture("x with its noise" if model.pipe.noise else "x"), picture("Bits/dim by patch")]
            scale = gr.HTML()
            with gr.Row():
                pictures += [picture("Latents z = f(x)"), picture("And back: f⁻¹(z)")]
    outputs = [figures, *pictures, scale, classes]

    def ask(path: str | None, label: int, level: float, progress: Progress = PROGRESS) -> Iterator[Any]:
        yield [None] * len(outputs)  # so that nothing stands beside an image that it does not belong to
        if path is not None:
            with messages():
                pixels = model.read_upload(path)
                found = inspect(model.pipe, pixels, jax.random.key(0), label, _level(model, level), progress)
            yield _answers(model, pixels, found)

    def take(event: gr.SelectData) -> Any:
        return to_pil(first.images[event.index])

    gr.on(
        [image.change, *(control.input for control in conditions)],
        ask,
        [image, *conditions],
        outputs,
        show_progress_on=figures,
        **EVENT,
    )
    page.load(lambda: list(map(to_pil, first.images[:NUM_EXAMPLES])), None, own, **EVENT)
    own.select(take, None, image, **EVENT)


def _answers(model: DemoModel, pixels: np.ndarray, found: Inspection) -> list[Any]:
    """Values of the Ask tab's outputs, of an image uint8 [H, W, K]."""
    pictures = [
        to_uint8(found.noisy),
        overlay(pixels, found.patch_bits),
        to_uint8(found.latents / 3),  # nearly all of N(0, 1) is within ±3
        to_uint8(found.reconstruction),
    ]
    return [
        _figures(model, found),
        *(to_pil(enlarge(shown[None], SIDE)[0]) for shown in pictures),
        _scale(found.patch_bits),
        _class_probabilities(model, found),
    ]


def _figures(model: DemoModel, found: Inspection) -> str:
    noise = model.pipe.noise
    unit = "of the image as it is; the training's noise is not known"
    if noise is not None:
        unit = f"of the image with {noise} noise; compares only under the same"
    if noise is not None and noise.kind == "uniform":
        unit = "of 8-bit data, under uniform dequantisation"
    figures = [
        ("log p(x)", f"{found.log_prob:,.1f}", "nats"),
        ("bits per dimension", f"{found.bits_per_dim:.3f}", unit),
        ("mean of z²", f"{np.square(found.latents).mean():.3f}", "near 1 for images like those of the training"),
        ("error of x → z → x", f"{found.error:.1e}", "the largest of a pixel; 8-bit values are 7.8e-03 apart"),
    ]
    cards = "".join(f"<div><span>{name}</span><b>{value}</b><span>{note}</span></div>" for name, value, note in figures)
    return f"<div class='figures'>{cards}</div>"


def _scale(patch_bits: np.ndarray) -> str:
    """The colours of `overlay`, and what a patch's bits are."""
    colours = ", ".join(f"rgb{colour}" for colour in COLOURS)
    return (
        f"<div class='scale'>{patch_bits.min():.2f}<i style='background: linear-gradient(to right, {colours})'></i>"
        f"{patch_bits.max():.2f} bits/dim</div><div class='note'>Where log p(x) arises: each patch's ½ z² and the "
        f"log-scales that all blocks give it. The mean of the patches, {patch_bits.mean():.3f}, is the image's.</div>"
    )


def _class_probabilities(model: DemoModel, found: Inspection) -> Any:
    if found.class_log_probs is None:
        return None
    calibrated = "not calibrated"
    if model.temperature:
        calibrated = f"at temperature {model.temperature:.2f}"
    posterior = found.posterior(model.temperature or 1.0)
    named = dict(zip(model.class_names, posterior.tolist(), strict=True))
    return gr.Label(named, label=f"Class probabilities, {calibrated}", num_top_classes=10)


def _interpolate_tab(model: DemoModel, first: Drawn) -> None:
    gr.Markdown(
        "Two images become latents, and between these lies a great circle, "
        "z(t) = (sin((1 - t) θ) z₀ + sin(t θ) z₁) / sin θ. Each of them is an image again, x(t) = f⁻¹(z(t))."
    )
    with gr.Row():
        uploads = [upload("From"), upload("To")]
    button = gr.Button("None at hand? Take two that the model drew")
    with gr.Row():
        conditions = _conditions(model)
    between = gallery("x(t), from t = 0 to 1", STEPS)
    animation = gr.HTML(elem_classes="way")

    def go(
        start: str | None, end: str | None, label: int, level: float, progress: Progress = PROGRESS
    ) -> Iterator[Any]:
        yield None, None
        if start is not None and end is not None:
            with messages():
                images = np.stack([model.read_upload(path) for path in (start, end)])
                key = jax.random.key(0)
                found = interpolate(model.pipe, images, key, STEPS, label, _level(model, level), progress)
            pixels = enlarge(quantise(found)[0], TILE)
            yield list(map(to_pil, pixels)), film([*pixels, *pixels[-2:0:-1]], "from one image to the other")

    changes = [control.change for control in uploads] + [control.input for control in conditions]
    gr.on(changes, go, [*uploads, *conditions], [between, animation], show_progress_on=between, **EVENT)
    clicks = itertools.count()

    def take_two() -> list[Any]:
        chosen = np.random.default_rng(next(clicks)).choice(len(first.images), 2, replace=len(first.images) < 2)
        return [to_pil(image) for image in first.images[chosen]]

    button.click(take_two, None, uploads, **EVENT)


def _conditions(model: DemoModel) -> list[Any]:
    """Controls of the class, and of the noise level of a flow of many."""
    noise = model.pipe.noise
    low, high = (noise.std_min, noise.std_max) if noise and noise.kind == "levels" else (0.01, 1.0)
    return [
        gr.Dropdown(model.choices, value=NO_CLASS, label="Class", visible=bool(model.pipe.config.num_classes)),
        gr.Slider(low, high, low, label="Noise level σ", visible=model.pipe.config.noise_conditional),
    ]


def _level(model: DemoModel, value: float) -> float | None:
    return value if model.pipe.config.noise_conditional else None
