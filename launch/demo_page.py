"""The pages that launch.demo serves: of a flow of images, tab by tab, and of text to image."""

import base64
import contextlib
import dataclasses
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import jax
import numpy as np

from launch.demo_model import IN_TURN, NO_CLASS, Drawn, calibration, class_names, draw, facts, read_upload
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.generation import quantise
from tarflow_jax.figures import COLOURS, encode_gif, enlarge, grid, overlay, to_pil, to_uint8
from tarflow_jax.inspection import Inspection, inspect
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance
from tarflow_jax.text_to_image import TextToImage

SIDE = 224  # pixels, of a picture in a gallery
NUM_EXAMPLES = 6  # images that the Ask tab offers
SEED_LIMIT = 2**31 - 1
EVENT: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}  # one model: one event at a time


def _page(name: str, about: str, known: dict[str, str]) -> gr.Blocks:
    """Returns a page with a head: the model's name, a sentence and facts."""
    shown = "".join(f"<div><span>{escape(fact)}</span> {escape(value)}</div>" for fact, value in known.items())
    title = f"<h1>TarFlow <span>{escape(name)}</span></h1><p>{escape(about)}</p>"
    with gr.Blocks(title=f"TarFlow: {name}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(f"{title}<div class='facts'>{shown}</div>", elem_classes="head")
    return page


def _serve(page: gr.Blocks, host: str, port: int) -> None:
    font = gr.themes.LocalFont("IBM Plex Sans", (400, 700))  # one of Gradio's own files
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=(font, "sans-serif"))
    css = Path(__file__).with_name("demo_page.css")
    options = {"prevent_thread_lock": True, "quiet": True, "footer_links": [], "max_file_size": "16mb", "share": False}
    page.launch(server_name=host, server_port=port, theme=theme, css_paths=css, run_history=False, **options)
    print(f"http://{host}:{port}", flush=True)
    page.block_thread()


def serve(pipe: TarFlowPipeline, name: str, num_images: int, host: str, port: int) -> None:
    """Draws the first images, which compiles most programs, and serves the page until the process is stopped."""
    if pipe.config.image_channels not in (1, 3):
        raise UserError(f"the demo shows images of 1 or 3 channels, this model's have {pipe.config.image_channels}")
    print(f"drawing the first {num_images} images", flush=True)
    about = "An invertible map z = f(x) from images to Gaussian noise: exact likelihoods, exact latents."
    with _page(name, about, facts(pipe)) as page, gr.Tabs(overflow_behavior="wrap"):
        first = _draw_tabs(pipe, num_images, page)
        with gr.Tab("Ask"):
            _ask_tab(pipe, page, first.images)
    _serve(page, host, port)


def serve_captions(pipe: TextToImage, name: str, num_images: int, host: str, port: int) -> None:
    """Serves a page that draws from captions, or from classes, until the process is stopped."""
    flow, default = pipe.flow, pipe.guidance or Guidance()
    with _page(name, f"{flow.config.summary} over latents", {}) as page, gr.Tabs(), gr.Tab("Draw"), gr.Row():
        with gr.Column(scale=2, min_width=280):
            prompt = gr.Textbox("a red heart", label="Caption", max_length=1000, visible=pipe.text is not None)
            label = _class(flow, [])
            guidance = gr.Slider(0, 8, float(default.weight), step=0.1, label="Guidance weight w")
            seed = _seed()
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=5, min_width=300):
            images = _gallery("Samples", 4)

        def draw_captions(prompt: str, label: int, weight: float, seed: float | None) -> list[Any]:
            with _errors_as_messages():
                guided = dataclasses.replace(default, weight=weight)
                labels = np.full(num_images, label, np.int32) if flow.config.num_classes else None
                texts = None if pipe.text is None else str(prompt or "")
                drawn = pipe(texts, num_images, guided, jax.random.key(int(seed or 0)), labels=labels)
                return _pictures(quantise(np.asarray(drawn))[0])

        controls, options = [prompt, label, guidance, seed], {"api_name": "draw", "show_progress_on": images, **EVENT}
        gr.on([button.click, prompt.submit], draw_captions, controls, images, **options)
    _serve(page, host, port)


def _draw_tabs(pipe: TarFlowPipeline, num_images: int, page: gr.Blocks) -> Drawn:
    """Builds both tabs and returns the first samples."""
    names = class_names(pipe)
    with gr.Tab("Draw"):
        gr.Markdown("Latents z ~ τ · N(0, I) become images x = f⁻¹(z): the blocks are inverted, one after the other.")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                seed = _seed()
                controls = [*_controls(pipe), seed]
                with gr.Row():
                    button = gr.Button("Draw", variant="primary", min_width=100)
                    next_seed = gr.Button("Next seed", min_width=100)
            with gr.Column(scale=5, min_width=300):
                images = _gallery("Samples", 4)
    with gr.Tab("Watch it emerge"):
        gr.Markdown("The samples of *Draw* on their way: the latents, then the images after each inverted block.")
        with gr.Row():
            with gr.Column(min_width=300):
                animation = gr.HTML()
            with gr.Column(min_width=300):
                frames = _gallery("Block by block", 2)

    def shown(drawn: Drawn) -> list[Any]:
        captions = [names[label] if label >= 0 else None for label in drawn.labels]
        sheets = [grid(frame) for frame in drawn.frames.values()]
        film = base64.b64encode(encode_gif([*sheets, sheets[-1], sheets[-1]], 700)).decode()
        return [
            list(zip(_pictures(drawn.images), captions, strict=True)),
            f"<div class='film'><img alt='samples emerging from noise' src='data:image/gif;base64,{film}'></div>",
            list(zip(map(to_pil, sheets), drawn.frames, strict=True)),
        ]

    def draw_images(*settings: Any) -> list[Any]:
        with _errors_as_messages():
            drawn = draw(pipe, num_images, *settings)
        if drawn.num_bad:
            bad = f"{drawn.num_bad} of {num_images} images have pixels that are not finite or far outside [-1, 1]"
            gr.Warning(f"{bad}; use less guidance or a lower temperature, or train longer")
        return shown(drawn)

    outputs, options = [images, animation, frames], {"show_progress_on": images, **EVENT}
    button.click(draw_images, controls, outputs, api_name="draw", **options)
    advanced = next_seed.click(lambda seed: (int(seed or 0) + 1) % SEED_LIMIT, seed, seed, **EVENT)
    advanced.then(draw_images, controls, outputs, **options)
    first = draw(pipe, num_images, *(control.value for control in controls))
    page.load(lambda: shown(first), None, outputs, **options)
    return first


def _controls(pipe: TarFlowPipeline) -> list[Any]:
    """Returns the controls of the arguments of `draw` from `label` to `denoise`."""
    has_classes = bool(pipe.config.num_classes)
    label = _class(pipe, [("each class in turn", IN_TURN)])
    rule = f"a + w (a - a°) for shift and log-scale a, {'a° without class' if has_classes else 'of both passes'}"
    guidance = gr.Slider(0, 4, float(has_classes), step=0.1, label="Guidance weight w", info=rule)
    attention_temperature = gr.Slider(
        0.2, 1, 1.0 if has_classes else 0.7, step=0.05, label="Attention temperature of a°", visible=not has_classes
    )
    temperature = gr.Slider(0, 1.5, 1.0, step=0.05, label="Temperature τ of the latents")
    denoise = gr.Checkbox(True, label="Denoise", info="x + σ² ∇ log p(x) (Tweedie)", visible=pipe.noise_std is not None)
    return [label, guidance, attention_temperature, temperature, denoise]


def _ask_tab(pipe: TarFlowPipeline, page: gr.Blocks, drawn: np.ndarray) -> None:
    noise, has_levels, temperature = pipe.noise, pipe.config.noise_conditional, calibration(pipe)
    low, high = (noise.std_min, noise.std_max) if noise and noise.kind == "levels" else (0.01, 1.0)
    gr.Markdown("For any image: its exact log p(x), the patches that cost most, its class by Bayes' rule, its latents.")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image = _upload()
            examples = _gallery("Or pick one that the model drew", NUM_EXAMPLES, allow_preview=False, buttons=[])
            label = _class(pipe, [])
            level = gr.Slider(low, high, low, label="Noise level σ", visible=has_levels)
            calibrated = f"at temperature {temperature:.2f}" if temperature else "not calibrated"
            classes = gr.Label(label=f"Class probabilities, {calibrated}", num_top_classes=10, visible=label.visible)
        with gr.Column(scale=5, min_width=300):
            figures, pictures = gr.HTML(), _gallery("The image under the model", 2)

    def ask(path: str | None, label: int, level: float) -> Iterator[Any]:
        yield None, None, None  # clears the previous image's results
        if path is not None:
            with _errors_as_messages():
                pixels = read_upload(pipe, path)
                found = inspect(pipe, pixels, jax.random.key(0), label, level if has_levels else None)
            shown = {
                "x with noise" if noise else "x": to_uint8(found.noisy),
                "bits/dim by patch": overlay(pixels, found.patch_bits),
                "latents z = f(x)": to_uint8(found.latents / 3),  # nearly all of N(0, 1) lies within ±3
                "reconstruction f⁻¹(z)": to_uint8(found.reconstruction),
            }
            captioned = [(*_pictures(picture[None]), title) for title, picture in shown.items()]
            shares = [] if found.class_log_probs is None else found.posterior(temperature or 1.0).tolist()
            yield _figures(found), captioned, dict(zip(class_names(pipe), shares, strict=True))

    def pick(event: gr.SelectData) -> Any:
        return to_pil(drawn[event.index])

    inputs, outputs = [image, label, level], [figures, pictures, classes]
    gr.on([image.change, label.input, level.input], ask, inputs, outputs, show_progress_on=figures, **EVENT)
    page.load(lambda: list(map(to_pil, drawn[:NUM_EXAMPLES])), None, examples, **EVENT)
    examples.select(pick, None, image, api_visibility="private", **EVENT)


def _figures(found: Inspection) -> str:
    figures = [
        ("log p(x)", f"{found.log_prob:,.1f}", "nats"),
        ("bits per dimension", f"{found.bits_per_dim:.3f}", "comparable only under the same training noise"),
        ("mean of z²", f"{np.square(found.latents).mean():.3f}", "near 1 for images like the training data"),
        ("error of x → z → x", f"{found.error:.1e}", "the largest of any pixel; 8-bit values are 7.8e-03 apart"),
    ]
    cards = "".join(f"<div><span>{name}</span><b>{value}</b><span>{note}</span></div>" for name, value, note in figures)
    colours, bits = ", ".join(f"rgb{colour}" for colour in COLOURS), found.patch_bits
    return (
        f"<div class='figures'>{cards}</div><div class='scale'>bits/dim by patch: {bits.min():.2f}"
        f"<i style='background: linear-gradient(to right, {colours})'></i>{bits.max():.2f}</div><div class='note'>"
        "A patch's share of -log p(x) is its ½ z² and its log-scales in all blocks.</div>"
    )


@contextlib.contextmanager
def _errors_as_messages() -> Iterator[None]:
    """Shows a UserError in the page as one line; the server logs the traceback of any other exception."""
    try:
        yield
    except UserError as error:
        raise gr.Error(" ".join(str(error).split()), duration=None, print_exception=False) from None


def _class(pipe: TarFlowPipeline, others: list[tuple[str, int]]) -> gr.Dropdown:
    """A choice of a class, or of the first of `others`, or of no class."""
    choices = [*others, ("no class", NO_CLASS), *((name, label) for label, name in enumerate(class_names(pipe)))]
    return gr.Dropdown(choices, value=choices[0][1], label="Class", visible=pipe.config.num_classes > 0)


def _seed() -> gr.Number:
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SEED_LIMIT)


def _upload() -> gr.Image:
    """An image to drop; events receive the file's path, because our decoder says what is wrong with a file."""
    image = gr.Image(
        label="An image", sources=["upload", "clipboard"], type="filepath", image_mode=None, height=280, format="png",
        elem_classes=["pixels", "upload"],
    )  # fmt: skip

    def uploaded(payload: Any) -> str | None:
        # Gradio checks the path only where the caller says that it is a file.
        if payload and not Path(payload.path or "").resolve().is_relative_to(Path(image.GRADIO_CACHE).resolve()):
            raise gr.Error("expected an uploaded image", print_exception=False)
        return payload and payload.path

    image.preprocess = uploaded
    return image


def _pictures(images: np.ndarray) -> list[Any]:
    return list(map(to_pil, enlarge(images, SIDE)))


def _gallery(label: str, columns: int, **options: Any) -> gr.Gallery:
    classes = ["pixels", "many"] if columns > 4 else ["pixels"]
    return gr.Gallery(
        label=label, columns=columns, format="png", height="auto", object_fit="contain", elem_classes=classes, **options
    )
