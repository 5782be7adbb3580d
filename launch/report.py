"""Tells of a training run in one HTML file, to send to someone: it opens from disk, anywhere, and asks no network.

python -m launch.report --workdir=runs/digits
python -m launch.report --workdir=runs/fashion_mnist --output=fashion_mnist.html

Has the recipe, curves, previews over the steps, samples, all that launch.evaluate has measured with its protocol,
machine, versions and commit. A run may still be under way.
"""

import sys
from collections.abc import Sequence

from absl import flags
from etils import epath

from launch import common
from launch.report_page import page
from launch.report_workdir import read_run
from tarflow_jax.errors import UserError
from tarflow_jax.files import write_text

WORKDIR = flags.DEFINE_string("workdir", None, "Tell of this training run, named by its folder.")
OUTPUT = flags.DEFINE_string("output", None, "Write this HTML file; WORKDIR/report.html if not given.")
flags.mark_flags_as_required(["workdir"])


def main(argv: Sequence[str]) -> None:
    """Reads, writes, and names what was left out."""
    workdir = common.folder("workdir")
    output = epath.Path(common.folder("output") if OUTPUT.value else epath.Path(workdir) / "report.html")
    if output.is_dir():
        raise UserError(f"--output={output} is a folder; expected a file")
    run = read_run(workdir)
    for note in run.notes:
        print(f"left out: {note}", file=sys.stderr)
    write_text(output, page(run))
    print(output)


if __name__ == "__main__":
    common.run(main)
