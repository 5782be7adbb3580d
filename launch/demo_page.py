"""The page that launch.demo serves, tab by tab."""

import base64
import contextlib
import dataclasses
import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import jax
import numpy as np

from launch.demo_model import IN_TURN, NO_CLASS, SEED_LIMIT, DemoModel, Drawn
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.evaluation.generation import quantise
from tarflow_jax.figures import COLOURS, encode_gif, enlarge, grid, overlay, to_pil, to_uint8
from tarflow_jax.inspection import Inspection, Progress, inspect, interpolate
from tarflow_jax.options import checked
from tarflow_jax.sampling import Guidance
from tarflow_jax.text_to_image import TextToImage

TILE, SIDE = 224, 448  # pixels: side of a picture in a gallery, and of one alone
NUM_EXAMPLES, NUM_STEPS = 6, 8  # of an image to upload; of an interpolation
KINDS = {gr.Slider: float, gr.Dropdown: int, gr.Radio: str, gr.Checkbox: bool, gr.Number: float | None}  # of values
PROGRESS = gr.Progress()
EVENT: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}  # one model: one event at a time


class _Page(gr.Blocks):
    """A page that refuses in one line what only a caller of its API can send."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **options: Any) -> list[Any]:
        with _errors_as_messages():
            for control, value in zip(block_fn.inputs, inputs, strict=False):
                if kind := KINDS.get(type(control)):
                    checked(control.label, value, kind, low=-math.inf)
            try:
                return await super().preprocess_data(block_fn, inputs, *args, **options)
            except Exception as error:  # whatever a component makes of it
                raise UserError(one_line(error.__cause__ or error)) from None


def serve(model: DemoModel, host: str, port: int) -> None:
    """Draws the first images, which compiles most programs, and serves the page until the process is stopped."""
    print(f"drawing the first {model.num_images} images", flush=True)
    with _Page(title=f"TarFlow: {model.name}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(_head(model), elem_classes="head")
        with gr.Tabs(overflow_behavior="wrap"):
            first = _draw_tabs(model, page)
            with gr.Tab("Ask"):
                _ask_tab(model, page, first)
            with gr.Tab("Interpolate"):
                _interpolate_tab(model, first)
    _launch(page, host, port)


def serve_captions(pipe: TextToImage, name: str, num_images: int, host: str, port: int) -> None:
    """Serves a page that draws from captions, or from classes, until the process is stopped."""
    flow, names = pipe.flow, [("no class", NO_CLASS), *((name, i) for i, name in enumerate(pipe.flow.label_names))]
    weight = float(pipe.guidance.weight) if pipe.guidance else 0.0
    head = f"<h1>TarFlow <span>{html.escape(name)}</span></h1><p>{html.escape(flow.config.summary)} over latents</p>"
    with _Page(title=f"TarFlow: {name}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(head, elem_classes="head")
        with gr.Tabs(), gr.Tab("Draw"), gr.Row():
            with gr.Column(scale=2, min_width=280):
                prompt = gr.Textbox("a red heart", label="Caption", max_length=1000, visible=pipe.text is not None)
                label = gr.Dropdown(names, value=NO_CLASS, label="Class", visible=flow.config.num_classes > 0)
                guidance = gr.Slider(0, 8, weight, step=0.1, label="Guidance weight w")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SEED_LIMIT)
                button = gr.Button("Draw", variant="primary")
            with gr.Column(scale=5, min_width=300):
                images = _gallery("Samples", 4)

        def draw(prompt: str, label: int, weight: float, seed: int) -> list[Any]:
            with _errors_as_messages():
                guided = dataclasses.replace(pipe.guidance or Guidance(), weight=weight)
                labels = np.full(num_images, label, np.int32) if flow.config.num_classes else None
                texts = None if pipe.text is None else str(prompt or "")
                drawn = pipe(texts, num_images, guided, jax.random.key(int(seed or 0)), labels=labels)
                return list(map(to_pil, enlarge(quantise(np.asarray(drawn))[0], TILE)))

        controls, options = [prompt, label, guidance, seed], {"show_progress_on": images, **EVENT}
        gr.on([button.click, prompt.submit], draw, controls, images, **options)
    _launch(page, host, port)


def _launch(page: gr.Blocks, host: str, port: int) -> None:
    fonts = (gr.themes.LocalFont("IBM Plex Sans", (400, 700)), "system-ui", "sans-serif")  # Gradio's own files
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=fonts),
        css_paths=Path(__file__).with_name("demo_page.css"),
        max_file_size="16mb",
        footer_links=[],
        # Nothing leaves this machine.
        share=False,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
    )
    print(f"http://{host}:{port}", flush=True)
    page.block_thread()


def _head(model: DemoModel) -> str:
    facts = "".join(
        f"<div><span>{html.escape(name)}</span> {html.escape(value)}</div>" for name, value in model.facts().items()
    )
    return (
        f"<h1>TarFlow <span>{html.escape(model.name)}</span></h1><p>A normalizing flow, an invertible map z = f(x) "
        f"from images to Gaussian noise: exact likelihoods, exact latents.</p><div class='facts'>{facts}</div>"
    )


def _draw_tabs(model: DemoModel, page: gr.Blocks) -> Drawn:
    """Builds both tabs and returns the first samples."""
    with gr.Tab("Draw"):
        gr.Markdown("Latents z ~ τ · N(0, I) become images x = f⁻¹(z): the blocks are inverted, one after the other.")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                controls, seed = _controls(model)
                with gr.Row():
                    button = gr.Button("Draw", variant="primary", min_width=100)
                    next_seed = gr.Button("Next seed", min_width=100)
            with gr.Column(scale=5, min_width=300):
                images = _gallery("Samples", 4)
    with gr.Tab("Watch it emerge"):
        gr.Markdown(
            "The samples of *Draw* on their way: the latents, then the images after each inverted block, the last "
            "block first" + (", and finally the denoised images." if model.pipe.noise_std is not None else ".")
        )
        with gr.Row():
            with gr.Column(min_width=300):
                animation = gr.HTML()
            with gr.Column(min_width=300):
                frames = _gallery("Block by block", 2)

    def draw(
        label: int, guidance: float, attention_temperature: float, temperature: float, seed: int, decoder: str,
        denoise: bool, progress: Progress = PROGRESS,
    ) -> list[Any]:  # fmt: skip
        with _errors_as_messages():
            drawn = model.draw(
                label, guidance, attention_temperature, temperature, int(seed or 0), decoder, denoise, progress
            )
        if drawn.num_bad:
            gr.Warning(
                f"{drawn.num_bad} of {model.num_images} images have pixels that are not finite or far outside [-1, 1]; "
                "use less guidance or a lower temperature, or train longer"
            )
        return _drawn(model, drawn)

    shown = [images, animation, frames]
    options = {"show_progress_on": images, **EVENT}
    button.click(draw, controls, shown, **options)
    advanced = next_seed.click(lambda seed: (int(seed or 0) + 1) % SEED_LIMIT, seed, seed, **EVENT)
    advanced.then(draw, controls, shown, **options)
    first = model.draw(*(control.value for control in controls))
    page.load(lambda: _drawn(model, first), None, shown, **options)
    return first


def _controls(model: DemoModel) -> tuple[list[Any], gr.Number]:
    """Returns the controls of `DemoModel.draw`'s arguments, in order, and the seed's control."""
    has_classes = bool(model.pipe.config.num_classes)
    unguided = "a° without class" if has_classes else "of both passes"
    label = gr.Dropdown(
        [("each class in turn", IN_TURN), *model.choices], value=IN_TURN, label="Class", visible=has_classes
    )
    guidance = gr.Slider(
        0, 4, 1.0 if has_classes else 0.0, step=0.1, label="Guidance weight w",
        info=f"a + w (a - a°) for shift and log-scale a, {unguided}",
    )  # fmt: skip
    attention_temperature = gr.Slider(
        0.2, 1, 1.0 if has_classes else 0.7, step=0.05, label="Attention temperature of a°", visible=not has_classes
    )
    temperature = gr.Slider(
        0, 1.5, 1.0, step=0.05, label="Temperature τ of the latents",
        info="1 samples the model's distribution; less stays closer to its mode",
    )  # fmt: skip
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SEED_LIMIT)
    decoder = gr.Radio(
        list(model.decoders), value="Sequential", label="Decoder",
        info="Token after token, or all at once until nothing changes: the same images",
    )  # fmt: skip
    denoise = gr.Checkbox(
        True, label="Denoise",
        info="x + σ² ∇ log p(x), Tweedie's formula" + (", in steps of σ" if model.pipe.sampling_noise_std else ""),
        visible=model.pipe.noise_std is not None,
    )  # fmt: skip
    return [label, guidance, attention_temperature, temperature, seed, decoder, denoise], seed


def _drawn(model: DemoModel, drawn: Drawn) -> list[Any]:
    """Values of the gallery of samples, of the animation, and of the gallery of frames."""
    names = {label: name for name, label in model.choices} if model.class_names else {}
    captions = [names.get(label) for label in drawn.labels.tolist()]
    sheets = [grid(frame) for frame in drawn.frames.values()]
    return [
        list(zip(map(to_pil, enlarge(drawn.images, TILE)), captions, strict=True)),
        _animation([*sheets, sheets[-1], sheets[-1]], "the samples emerging from noise"),
        list(zip(map(to_pil, sheets), drawn.frames, strict=True)),
    ]


def _ask_tab(model: DemoModel, page: gr.Blocks, first: Drawn) -> None:
    gr.Markdown("For any image: its exact log p(x), the patches that cost most, its class by Bayes' rule, its latents.")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image = _upload("An image")
            examples = _gallery("Or pick one that the model drew", NUM_EXAMPLES, allow_preview=False, buttons=[])
            conditions = _conditions(model)
            classes = gr.Label(label="Class probabilities", visible=bool(model.pipe.config.num_classes))
        with gr.Column(scale=5, min_width=300):
            figures = gr.HTML()
            with gr.Row():
                pictures = [_picture("x with noise" if model.pipe.noise else "x"), _picture("Bits/dim by patch")]
            scale = gr.HTML()
            with gr.Row():
                pictures += [_picture("Latents z = f(x)"), _picture("Reconstruction f⁻¹(z)")]
    outputs = [figures, *pictures, scale, classes]

    def ask(path: str | None, label: int, level: float, progress: Progress = PROGRESS) -> Iterator[Any]:
        yield [None] * len(outputs)  # clears the previous image's results
        if path is not None:
            with _errors_as_messages():
                pixels = model.read_upload(path)
                found = inspect(model.pipe, pixels, jax.random.key(0), label, _noise_std(model, level), progress)
            yield _answers(model, pixels, found)

    def pick(event: gr.EventData) -> Any:  # gr.SelectData fails where a caller sends none
        with _errors_as_messages():
            data = event._data if isinstance(event._data, dict) else {}
            index = checked("index", data.get("index"), int)
            return to_pil(first.images[min(index, len(first.images) - 1)])

    changes = [image.change, *(control.input for control in conditions)]
    gr.on(changes, ask, [image, *conditions], outputs, show_progress_on=figures, **EVENT)
    page.load(lambda: list(map(to_pil, first.images[:NUM_EXAMPLES])), None, examples, **EVENT)
    examples.select(pick, None, image, **EVENT)


def _answers(model: DemoModel, pixels: np.ndarray, found: Inspection) -> list[Any]:
    """Values of the Ask tab's outputs for an image uint8 [H, W, K]."""
    pictures = [
        to_uint8(found.noisy),
        overlay(pixels, found.patch_bits),
        to_uint8(found.latents / 3),  # nearly all of N(0, 1) lies within ±3
        to_uint8(found.reconstruction),
    ]
    classes = None
    if found.class_log_probs is not None:
        calibrated = f"at temperature {model.temperature:.2f}" if model.temperature else "not calibrated"
        posterior = dict(zip(model.class_names, found.posterior(model.temperature or 1.0).tolist(), strict=True))
        classes = gr.Label(posterior, label=f"Class probabilities, {calibrated}", num_top_classes=10)
    return [
        _figures(model, found),
        *(to_pil(enlarge(shown[None], SIDE)[0]) for shown in pictures),
        _scale(found.patch_bits),
        classes,
    ]


def _figures(model: DemoModel, found: Inspection) -> str:
    noise = model.pipe.noise
    if noise is None:
        unit = "of the image as it is; the training's noise is not known"
    elif noise.kind == "uniform":
        unit = "of 8-bit data, under uniform dequantisation"
    else:
        unit = "of the noisy image; comparable only at the same noise level"
    figures = [
        ("log p(x)", f"{found.log_prob:,.1f}", "nats"),
        ("bits per dimension", f"{found.bits_per_dim:.3f}", unit),
        ("mean of z²", f"{np.square(found.latents).mean():.3f}", "near 1 for images like the training data"),
        ("error of x → z → x", f"{found.error:.1e}", "the largest of any pixel; 8-bit values are 7.8e-03 apart"),
    ]
    cards = "".join(f"<div><span>{name}</span><b>{value}</b><span>{note}</span></div>" for name, value, note in figures)
    return f"<div class='figures'>{cards}</div>"


def _scale(patch_bits: np.ndarray) -> str:
    colours = ", ".join(f"rgb{colour}" for colour in COLOURS)
    return (
        f"<div class='scale'>{patch_bits.min():.2f}<i style='background: linear-gradient(to right, {colours})'></i>"
        f"{patch_bits.max():.2f} bits/dim</div><div class='note'>Each patch's share of -log p(x): its ½ z² and its "
        f"log-scales in all blocks. The mean over patches, {patch_bits.mean():.3f}, is the image's.</div>"
    )


def _interpolate_tab(model: DemoModel, first: Drawn) -> None:
    gr.Markdown(
        "Two images become latents, and a great circle connects these, "
        "z(t) = (sin((1 - t) θ) z₀ + sin(t θ) z₁) / sin θ. Every point on it decodes to an image, x(t) = f⁻¹(z(t))."
    )
    with gr.Row():
        uploads = [_upload("From"), _upload("To")]
    button = gr.Button("Or pick two that the model drew")
    with gr.Row():
        conditions = _conditions(model)
    between = _gallery("x(t), from t = 0 to 1", NUM_STEPS)
    animation = gr.HTML(elem_classes="way")

    def go(
        start: str | None, end: str | None, label: int, level: float, progress: Progress = PROGRESS
    ) -> Iterator[Any]:
        yield None, None
        if start is not None and end is not None:
            with _errors_as_messages():
                images = np.stack([model.read_upload(path) for path in (start, end)])
                key, noise_std = jax.random.key(0), _noise_std(model, level)
                found = interpolate(model.pipe, images, key, NUM_STEPS, label, noise_std, progress)
            pixels = enlarge(quantise(found)[0], TILE)
            yield list(map(to_pil, pixels)), _animation([*pixels, *pixels[-2:0:-1]], "from one image to the other")

    changes = [control.change for control in uploads] + [control.input for control in conditions]
    gr.on(changes, go, [*uploads, *conditions], [between, animation], show_progress_on=between, **EVENT)

    def pick_two() -> list[Any]:
        chosen = np.random.default_rng().choice(len(first.images), 2, replace=len(first.images) < 2)
        return [to_pil(image) for image in first.images[chosen]]

    button.click(pick_two, None, uploads, **EVENT)


def _conditions(model: DemoModel) -> list[Any]:
    noise = model.pipe.noise
    low, high = (noise.std_min, noise.std_max) if noise and noise.kind == "levels" else (0.01, 1.0)
    return [
        gr.Dropdown(model.choices, value=NO_CLASS, label="Class", visible=bool(model.pipe.config.num_classes)),
        gr.Slider(low, high, low, label="Noise level σ", visible=model.pipe.config.noise_conditional),
    ]


def _noise_std(model: DemoModel, level: float) -> float | None:
    return level if model.pipe.config.noise_conditional else None


@contextlib.contextmanager
def _errors_as_messages() -> Iterator[None]:
    """Shows a UserError in the page as one line; the server logs the traceback of any other exception."""
    try:
        yield
    except UserError as error:
        raise gr.Error(" ".join(str(error).split()), duration=None, print_exception=False) from None


def _animation(sheets: list[np.ndarray], what: str) -> str:
    """Uint8 sheets [H, W, K] as HTML."""
    content = base64.b64encode(encode_gif(sheets, 700)).decode()
    return f"<div class='film'><img alt='{what}' src='data:image/gif;base64,{content}'></div>"


def _upload(label: str) -> gr.Image:
    """An image to drop; events receive the file's path, because our decoder says what is wrong with a file."""
    image = gr.Image(
        label=label, sources=["upload", "clipboard"], type="filepath", image_mode=None, height=280, format="png",
        elem_classes=["pixels", "upload"],
    )  # fmt: skip

    def uploaded(payload: Any) -> str | None:
        # Gradio checks the path only where the caller says that it is a file.
        if payload and not Path(payload.path or "").resolve().is_relative_to(Path(image.GRADIO_CACHE).resolve()):
            raise UserError("expected an uploaded image")
        return payload and payload.path

    image.preprocess = uploaded
    return image


def _picture(label: str) -> gr.Image:
    return gr.Image(
        label=label, interactive=False, format="png", elem_classes="pixels", min_width=150,
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def _gallery(label: str, columns: int, **options: Any) -> gr.Gallery:
    classes = ["pixels", "many"] if columns > 4 else ["pixels"]
    return gr.Gallery(
        label=label, columns=columns, format="png", height="auto", object_fit="contain", elem_classes=classes, **options
    )
