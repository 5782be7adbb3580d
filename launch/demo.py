"""A page to play with a trained model: draw, watch the images emerge, ask about an image.

python -m launch.demo --model=digits
python -m launch.demo --workdir=runs/fashion_mnist
"""

import importlib.util
import os
import socket
from collections.abc import Sequence

from absl import flags

from launch import cli
from tarflow_jax.errors import MissingPackageError, UserError
from tarflow_jax.text_to_image import TextToImage

HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is open to other machines.")
PORT = flags.DEFINE_integer("port", 7860, "Port to listen on.", lower_bound=1, upper_bound=65535)
NUM_IMAGES = flags.DEFINE_integer("num_images", 16, "Number of images drawn at a time.", lower_bound=1, upper_bound=100)
cli.define_model_flags()


def main(argv: Sequence[str]) -> None:
    """Opens the model and serves the page until it is stopped."""
    if importlib.util.find_spec("gradio") is None:
        raise MissingPackageError("the demo needs Gradio; pip install 'gradio>=6.31,<7'")
    # Gradio reads these when it is imported.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    from launch.demo_page import serve, serve_captions

    try:  # before a model is read
        family, *_, address = socket.getaddrinfo(HOST.value, PORT.value, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise UserError(f"--host={HOST.value} --port={PORT.value}: {error.strerror}; choose another") from error
    name, _ = cli.model_name()
    pipe = cli.open_pipeline(name, None)
    options = (os.path.basename(os.path.abspath(name)), NUM_IMAGES.value, HOST.value, PORT.value)
    if pipe.config.image_bits == 0:
        serve_captions(TextToImage.from_flow(pipe, name), *options)
    else:
        serve(pipe, *options)


if __name__ == "__main__":
    cli.run(main)
