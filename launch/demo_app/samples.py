"""The tabs that draw: samples, and how they emerge from noise."""

from typing import Any

import gradio as gr

from launch.demo_app.model import IN_TURN, SEED_LIMIT, DemoModel, Drawn, Settings
from launch.demo_app.widgets import EVENT, PROGRESS, TILE, film, gallery, messages
from tarflow_jax.figures import enlarge, grid, to_pil
from tarflow_jax.inspection import Progress


def tabs(model: DemoModel, page: gr.Blocks) -> Drawn:
    """Both tabs; returns the first samples, whose drawing compiles what most visits need."""
    start = _start(model)
    first = model.draw(start)
    with gr.Tab("Draw"):
        gr.Markdown("Latents z ~ τ · N(0, I) become images x = f⁻¹(z): the blocks are inverted, one after the other.")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                controls, seed = _controls(model, start)
                with gr.Row():
                    button = gr.Button("Draw", variant="primary", min_width=100)
                    following = gr.Button("Next seed", min_width=100)
            with gr.Column(scale=5, min_width=300):
                images = gallery("Samples", 4)
    with gr.Tab("Watch it emerge"):
        gr.Markdown(
            "The samples of *Draw* on their way: the latents, then what each inverted block makes of them, the last "
            "block first" + (", and at the end the denoised images." if model.pipe.noise_std is not None else ".")
        )
        with gr.Row():
            with gr.Column(min_width=300):
                animation = gr.HTML()
            with gr.Column(min_width=300):
                frames = gallery("Block by block", 2)

    def draw(
        label: int, guidance: float, attention_temperature: float, temperature: float, seed: int, decoder: str,
        denoise: bool, progress: Progress = PROGRESS,
    ) -> list[Any]:  # fmt: skip
        settings = Settings(label, guidance, attention_temperature, temperature, int(seed or 0), decoder, denoise)
        with messages():
            drawn = model.draw(settings, progress)
        if drawn.num_bad:
            gr.Warning(
                f"{drawn.num_bad} of {model.num_images} images have pixels that are no numbers or far outside [-1, 1]: "
                "less guidance, a lower temperature, or more training"
            )
        return _pictures(model, drawn)

    shown = [images, animation, frames]
    options = {"show_progress_on": images, **EVENT}
    button.click(draw, controls, shown, **options)
    advanced = following.click(lambda seed: (int(seed or 0) + 1) % SEED_LIMIT, seed, seed, **EVENT)
    advanced.then(draw, controls, shown, **options)
    page.load(lambda: _pictures(model, first), None, shown, **options)
    return first


def _start(model: DemoModel) -> Settings:
    """Guided where there are classes to guide by."""
    return Settings(guidance=1.0) if model.pipe.config.num_classes else Settings(attention_temperature=0.7)


def _controls(model: DemoModel, start: Settings) -> tuple[list[Any], gr.Number]:
    """Those of `Settings`, in its order; and the seed's among them."""
    classes = bool(model.pipe.config.num_classes)
    choices = [("each class in turn", IN_TURN), *model.choices]
    controls = [
        gr.Dropdown(choices, value=IN_TURN, label="Class", visible=classes),
        gr.Slider(
            0, 4, start.guidance, step=0.1, label="Guidance weight w",
            info=f"a + w (a - a°) for shift and log-scale a, {'a° without class' if classes else 'of both passes'}",
        ),
        gr.Slider(
            0.2, 1, start.attention_temperature, step=0.05, label="Attention temperature of a°", visible=not classes
        ),
        gr.Slider(
            0, 1.5, start.temperature, step=0.05, label="Temperature τ of the latents",
            info="1 is the model's distribution; less keeps near its middle",
        ),
        gr.Number(start.seed, label="Seed", precision=0, minimum=0, maximum=SEED_LIMIT),
        gr.Radio(
            list(model.decoders), value=start.decoder, label="Decoder",
            info="Token after token, or all at once until nothing changes: the same images",
        ),
        gr.Checkbox(
            start.denoise, label="Denoise",
            info="x + σ² ∇ log p(x), Tweedie's formula" + (", in steps of σ" if model.pipe.drawn_level else ""),
            visible=model.pipe.noise_std is not None,
        ),
    ]  # fmt: skip
    return controls, controls[4]


def _pictures(model: DemoModel, drawn: Drawn) -> list[Any]:
    """Of a draw: values of the gallery of samples, of the animation, and of the gallery of frames."""
    names = {label: name for name, label in model.choices} if model.class_names else {}
    captions = [names.get(label) for label in drawn.labels.tolist()]
    sheets = [grid(frame) for frame in drawn.frames]
    return [
        list(zip(map(to_pil, enlarge(drawn.images, TILE)), captions, strict=True)),
        film([*sheets, sheets[-1], sheets[-1]], "the samples emerging from noise"),
        list(zip(map(to_pil, sheets), model.frame_titles(drawn), strict=True)),
    ]
