"""The demo: `model` computes, without Gradio; `page` is what is served."""

import importlib.util
import logging
import os
import socket
from collections.abc import Callable

from tarflow_jax.errors import MissingPackageError, UserError


def page_server() -> Callable[..., None]:
    """Returns `page.serve`, with Gradio's telemetry off; raises MissingPackageError without Gradio."""
    # Gradio reads these when it is imported.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if importlib.util.find_spec("gradio") is None:
        raise MissingPackageError("the demo needs Gradio; pip install 'gradio>=6.31,<7'")
    from launch.demo_app.page import serve

    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio requests its own address
    return serve


def check_address(host: str, port: int) -> None:
    """Raises UserError if nothing can listen there, before a model is read."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: {error.strerror}; choose another port or address") from error
