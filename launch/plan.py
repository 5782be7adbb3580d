"""Compiles a recipe for devices that need not exist: does it fit, and how long will it take?

python -m launch.plan --config=configs/imagenet64_cond.py --topology=v5e:16x16 --mesh=32,1,8
python -m launch.plan --config=configs/imagenet64_uncond.py --topology=v5e:16x16 --num_slices=2 --mesh=256,1,2

TPUs need their compiler (pip install -r requirements-plan.txt), NVIDIA GPUs another (requirements-plan-gpu.txt). Exits
with 2 if the recipe does not fit. docs/launching.md explains the output, and what to change so that a recipe fits.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from launch import cli
from tarflow_jax.planning import make_plan, open_topology, prepare
from tarflow_jax.training import Recipe

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/imagenet64_cond.py.")
TOPOLOGY = flags.DEFINE_string("topology", None, "Devices, such as v5e:16x16, v5p:4x4x4, h100:8, h100:8x4 or cpu:8.")
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "TPU slices, each of that topology.", lower_bound=1)
MESH = flags.DEFINE_list("mesh", None, "Sizes data,fsdp,tensor, in place of --config.mesh's; one may be -1.")
flags.register_validator("mesh", lambda sizes: sizes is None or len(sizes) == 3, "expected data,fsdp,tensor")
SAMPLER = flags.DEFINE_bool("sampler", False, "Compile the sampler of a training batch instead of the step.")
MFU = flags.DEFINE_float("mfu", 0.4, "Model-FLOPs utilization to assume.", lower_bound=0.01, upper_bound=1.0)
JSON = flags.DEFINE_string("json", None, "File of JSON lines to append the figures to.")


def main(argv: Sequence[str]) -> int:
    """Compiles and prints; returns 2 if the recipe does not fit."""
    config = CONFIG.value
    if MESH.value:
        sizes = [cli.whole_number("mesh", size) for size in MESH.value]
        config.mesh.update(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    prepare(TOPOLOGY.value)
    plan = make_plan(Recipe(config), open_topology(TOPOLOGY.value, NUM_SLICES.value), SAMPLER.value)
    print(plan.table(MFU.value))
    if JSON.value:
        with open(JSON.value, "a") as file:
            print(json.dumps({"command": sys.argv[1:], **dataclasses.asdict(plan), "fits": plan.fits}), file=file)
    return 0 if plan.fits else 2


if __name__ == "__main__":
    cli.run(main, "config", "topology")
