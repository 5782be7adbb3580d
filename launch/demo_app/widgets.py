"""What the tabs share: how events run, messages, uploads, pictures."""

import base64
import contextlib
from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from tarflow_jax.errors import UserError
from tarflow_jax.figures import encode_gif

TILE = 224  # side of a picture among others, pixels
PROGRESS = gr.Progress()
EVENT: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}  # one model: one event at a time


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """Errors of the reader's making become a message of one line; any other is a fault of ours, and the server's log
    has its traceback."""
    try:
        yield
    except UserError as error:
        raise gr.Error(" ".join(str(error).split()), duration=None, print_exception=False) from None


def film(sheets: list[np.ndarray], what: str) -> str:
    """An animation of uint8 sheets [H, W, K] as HTML."""
    content = base64.b64encode(encode_gif(sheets, 700)).decode()
    return f"<div class='film'><img alt='{what}' src='data:image/gif;base64,{content}'></div>"


def upload(label: str) -> gr.Image:
    """An image to drop, of which functions get the file's path: Gradio's own decoder fails where ours says why."""
    image = gr.Image(
        label=label, sources=["upload", "clipboard"], type="filepath", image_mode=None, height=280, format="png",
        elem_classes=["pixels", "upload"],
    )  # fmt: skip
    image.preprocess = lambda payload: None if payload is None else payload.path or ""
    return image


def picture(label: str) -> gr.Image:
    """One that is shown."""
    return gr.Image(
        label=label, interactive=False, format="png", elem_classes="pixels", min_width=150,
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def gallery(label: str, columns: int, **options: Any) -> gr.Gallery:
    """Of small images, whose pixels are to be seen."""
    classes = ["pixels", "many"] if columns > 4 else ["pixels"]
    return gr.Gallery(
        label=label, columns=columns, format="png", height="auto", object_fit="contain", elem_classes=classes, **options
    )
