"""The page that is served."""

import html
from typing import Any

import gradio as gr

from launch.demo_app import questions, samples
from launch.demo_app.model import DemoModel

CSS = """
.head h1 { font-size: 1.9rem; margin: 0; } .head h1 span { color: var(--primary-500); }
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
.gradio-container, .gradio-container .main { width: 100% !important; min-width: 0 !important; }
@media (max-width: 640px) { .gradio-container .main { padding: 16px 12px !important; } }
.pixels img { image-rendering: pixelated; }
.pixels:not(.upload) [data-testid="block-label"] { position: static; border: 0; }
.pixels .image-frame img { width: 100%; height: 100%; object-fit: contain !important; }
.pixels .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; }
.pixels .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
.pixels .grid-container { grid-template-rows: none !important; grid-auto-rows: auto !important; padding-top: 0; }
.pixels .thumbnail-item { height: auto; min-height: 0; aspect-ratio: auto; }
@media (max-width: 640px) { .many .grid-container { --grid-cols: 4 !important; gap: 4px; } }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; margin-top: .5rem; font-size: .9rem; }
.facts span { color: var(--body-text-color-subdued); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; }
.figures div { padding: .7rem .9rem; border: 1px solid var(--border-color-primary); border-radius: 8px; }
.figures b { display: block; font-size: 1.45rem; }
.figures span, .note { color: var(--body-text-color-subdued); font-size: .85rem; }
.scale { display: flex; align-items: center; gap: .6rem; font-size: .85rem; }
.scale i { flex: 1; height: .7rem; border-radius: 4px; }
.film img { display: block; width: 100%; margin: 0 auto; image-rendering: pixelated; border-radius: 8px; }
.way .film img { max-width: 336px; }
"""


def build(model: DemoModel) -> tuple[gr.Blocks, dict[str, Any]]:
    """The page, and what it is launched with. Draws the first images, which compiles what most visits need."""
    with gr.Blocks(title=f"TarFlow: {model.name}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(_head(model), elem_classes="head")
        with gr.Tabs(overflow_behavior="wrap"):
            first = samples.tabs(model, page)
            questions.tabs(model, page, first)
    fonts = (gr.themes.LocalFont("IBM Plex Sans", (400, 700)), "system-ui", "sans-serif")  # which come with Gradio
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=fonts)
    offline = {"share": False, "ssr_mode": False, "mcp_server": False, "run_history": False, "footer_links": []}
    return page, {"theme": theme, "css": CSS, **offline}


def _head(model: DemoModel) -> str:
    facts = "".join(
        f"<div><span>{html.escape(name)}</span> {html.escape(value)}</div>" for name, value in model.facts().items()
    )
    return (
        f"<h1>TarFlow <span>{html.escape(model.name)}</span></h1><p>A normalizing flow, an invertible map z = f(x) "
        f"from images to Gaussian noise: exact likelihoods, exact latents.</p><div class='facts'>{facts}</div>"
    )
