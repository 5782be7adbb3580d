"""Writes one HTML file about a training run, to send to someone: it opens offline and loads nothing.

python -m launch.report --workdir=runs/digits
python -m launch.report --workdir=runs/fashion_mnist --output=fashion_mnist.html

Shows the recipe, curves, samples over the steps, all results of launch.evaluate with their protocol, machine, versions
and commit. The run may still be training.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from etils import epath

from launch import cli
from launch.report_page import Run, page
from tarflow_jax.errors import UserError
from tarflow_jax.files import write_text

WORKDIR = flags.DEFINE_string("workdir", None, "Run directory to report on.")
OUTPUT = flags.DEFINE_string("output", None, "HTML file to write; default: WORKDIR/report.html.")


def main(argv: Sequence[str]) -> None:
    """Writes the page, prints its path, and says on stderr what it had to leave out."""
    workdir = cli.folder("workdir")
    output = epath.Path(OUTPUT.value or f"{workdir}/report.html").expanduser()
    if Path(output).exists() and not Path(output).is_file():  # epath takes a device for a file
        raise UserError(f"--output={output} is a folder or a device; expected a file")
    run = Run(workdir)
    for note in run.notes:
        print(f"left out: {note}", file=sys.stderr)
    write_text(output, page(run))
    print(output)


if __name__ == "__main__":
    cli.run(main, "workdir")
