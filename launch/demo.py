"""A page to play with a trained model: draw, watch the images emerge, ask about an image, go from one to another.

python -m launch.demo --workdir=runs/fashion_mnist
"""

from collections.abc import Sequence

from absl import flags

from launch import common, demo_app
from launch.demo_app.model import DemoModel

WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, saved model's folder, or hub name.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is open to other machines.")
PORT = flags.DEFINE_integer("port", 7860, "Port to listen on.", lower_bound=1, upper_bound=65535)
NUM_IMAGES = flags.DEFINE_integer("num_images", 16, "Number of images drawn at a time.", lower_bound=1, upper_bound=100)
common.define_checkpoint_flag()
flags.mark_flags_as_required(["workdir"])


def main(argv: Sequence[str]) -> None:
    """Opens the model, draws the first images, and serves until it is stopped."""
    serve = demo_app.page_server()
    demo_app.check_address(HOST.value, PORT.value)
    workdir = common.folder("workdir")
    model = DemoModel(common.open_pipeline(workdir, None), workdir, NUM_IMAGES.value)
    serve(model, HOST.value, PORT.value)


if __name__ == "__main__":
    common.run(main)
