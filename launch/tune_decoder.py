"""Finds the fastest decoder for each block of a trained model, and saves the choice for --decoder=auto.

python -m launch.tune_decoder --workdir=runs/fashion_mnist --num_images=100,16,1

Every candidate decodes the model's own latents; it is chosen only if no pixel differs from sequential decoding by more
than --max_error. The choice holds for this machine, these batch sizes, weights and guidance: --decoder=auto refuses
other weights and guidance.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath

from launch import cli
from tarflow_jax.errors import UserError
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.pipeline import check_levels
from tarflow_jax.runtime import device_flow
from tarflow_jax.sampling import Decoder, Schedule
from tarflow_jax.sampling.tuning import Tuning, tune

WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, or saved model's folder.")
NUM_IMAGES = flags.DEFINE_list("num_images", ["100", "16", "1"], "Batch sizes to tune for.")
GUIDANCE = cli.define_number("guidance", 0.0, "Guidance weight w to tune for.")
cli.define_guidance_flags()
TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "Change at which parallel decoders stop.", lower_bound=0.0)
MAX_ERROR = flags.DEFINE_float(
    "max_error", 1 / 255, "Largest accepted error of a pixel, in [-1, 1] units.", lower_bound=0.0
)
SEED = cli.define_seed("Seed of the latents.")
cli.define_checkpoint_flag()


def main(argv: Sequence[str]) -> None:
    """Measures, prints a table for each batch size, writes decoder.json."""
    counts = [cli.whole_number("num_images", text) for text in NUM_IMAGES.value]
    if min(counts, default=0) < 1:
        raise UserError(f"--num_images is {','.join(NUM_IMAGES.value)!r}; expected positive numbers")
    workdir = cli.folder("workdir")
    if not epath.Path(workdir).is_dir():  # the choice is kept there, so a model of the hub will not do
        raise UserError(f"--workdir={workdir} is no folder; expected a run directory or a saved model's folder")
    pipe = cli.open_pipeline(workdir, None)
    guidance = cli.guidance(GUIDANCE.value).checked_for(pipe.config)
    decoders: dict[int, tuple[Decoder, ...]] = {}
    for count in counts:
        latents = pipe.latents(jax.random.key(SEED.value), count)
        labels = cli.example_labels(pipe.config.num_classes, count)
        tuning = tune(
            functools.partial(pipe.decode, latents, labels, guidance, noise_std=pipe.drawn_level),
            device_flow(pipe.config),
            pipe.variables,
            latents,
            None if labels is None else jnp.asarray(labels),
            guidance,
            check_levels(pipe.config, pipe.drawn_level, count),
            tolerance=TOLERANCE.value,
            max_error=MAX_ERROR.value,
        )
        decoders[count] = tuning.decoders
        print(f"{count} images\n{summary(tuning)}")
    Schedule(decoders, fingerprint(pipe.variables), guidance).write(workdir)
    print(epath.Path(workdir) / "decoder.json")


def summary(tuning: Tuning) -> str:
    """Formats a table with a row per block, and the times of all blocks together."""
    rows = []
    for report in tuning.reports:
        decoder = report.chosen.decoder
        fields = [str(getattr(decoder, name)) for name in ("num_segments", "init") if hasattr(decoder, name)]
        row = {
            "block": report.block,
            "CRM": report.crm,
            "decoder": f"{type(decoder).__name__}({', '.join(fields)})",
            "updates": report.chosen.updates,
            "seconds": report.chosen.seconds,
            "sequential": report.trials[0].seconds,
            "error": report.chosen.error,
        }
        rows.append(row)
    return (
        f"{cli.format_table(rows)}\n"
        f"together: {tuning.seconds:.4f} s, sequential {tuning.sequential_seconds:.4f} s, "
        f"{tuning.sequential_seconds / tuning.seconds:.2f} x; largest error of a pixel {tuning.error:.1e}"
    )


if __name__ == "__main__":
    cli.run(main, "workdir")
