"""Compiles a recipe for chips that need not be here, and tells what a step needs of them and takes at least.

python -m launch.plan --config=configs/imagenet64_cond.py --topology=v5e:16x16 --mesh=32,1,8
python -m launch.plan --config=configs/imagenet64_uncond.py --topology=v5e:16x16 --num_slices=2 --mesh=256,1,2
python -m launch.plan --config=configs/imagenet64_cond.py --topology=h100:8x4
python -m launch.plan --config=configs/digits.py --topology=cpu:8
python -m launch.plan --config=RECIPE --topology=v5e:4x4 --sampler --decoder=student --student=RECIPE_OF_THE_STUDENT

A TPU topology needs no TPU, but its compiler: pip install -r requirements-plan.txt. So do GPUs (a100, h100, h200, b200;
h100:8x4 is 4 hosts of 8), from requirements-plan-gpu.txt. Exit code 2 when the program does not fit; then changes are
tried, the smallest first, until one does; --search tries on for the lowest bound. docs/scaling.md tells how to read it.
"""

import functools
import json
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs.defaults import with_flow
from launch import common
from tarflow_jax.errors import UserError
from tarflow_jax.planning import (
    Plan,
    Topology,
    compile_program,
    open_topology,
    prepare,
    sample_program,
    student_program,
    train_program,
)
from tarflow_jax.planning.changes import as_flags, changed, dividing_options, lowest_bound, smallest_change
from tarflow_jax.training import Recipe

EXIT_DOES_NOT_FIT = 2

CONFIG = config_flags.DEFINE_config_file("config", None, "Plan this recipe, such as configs/imagenet64_cond.py.")
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Plan for these devices: v5e:16x16, v5p:4x4x4, …; h100:8, h100:8x4, …; cpu:8; gpu:1 if there is one.",
)
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Plan for this many TPU slices of that topology.", lower_bound=1)
MESH = flags.DEFINE_list("mesh", None, "Plan for meshes of sizes data,fsdp,tensor, as --config.mesh; one may be -1.")
SAMPLER = flags.DEFINE_bool("sampler", False, "Compile the sampler of a training batch, not the training step.")
DECODER = flags.DEFINE_enum(
    "decoder", "sequential", ["sequential", "student"], "Compile this sampler; the student is --student's."
)
STUDENT = config_flags.DEFINE_config_file(
    "student", None, "Recipe of the student of --decoder=student, such as configs/student/imagenet64_uncond.py."
)
MFU = flags.DEFINE_float(
    "mfu", 0.4, "Model-FLOPs utilisation that times are told for.", lower_bound=0.01, upper_bound=1.0
)
SEARCH = flags.DEFINE_bool("search", False, "Search accumulation, fsdp and remat for the lowest bound of a step.")
JSON = flags.DEFINE_string("json", None, "Append the figures to this file of JSON lines.")
flags.mark_flags_as_required(["config", "topology"])


def main(argv: Sequence[str]) -> int:
    """Compiles, prints a table, and searches if it must."""
    config = _config()
    if SEARCH.value and SAMPLER.value:
        raise UserError("--search changes how a training step is computed; leave out --sampler")
    prepare(TOPOLOGY.value)
    topology = open_topology(TOPOLOGY.value, NUM_SLICES.value)
    if SEARCH.value and not topology.chip.flops:
        raise UserError(f"--search compares times, and {topology.name} has no rates in tarflow_jax/planning/chips.py")
    if MESH.value:
        sizes = [common.whole_number("mesh", size) for size in MESH.value]
        if len(sizes) != 3:
            raise UserError(f"--mesh has {len(sizes)} sizes; expected data,fsdp,tensor")
        config.mesh.update(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    recipe = Recipe(config)
    make = functools.partial(make_plan, topology)
    plan = make(recipe)
    print(plan.table(MFU.value))
    if JSON.value:
        with open(JSON.value, "a") as file:
            file.write(json.dumps({"command": sys.argv[1:], **plan.figures()}) + "\n")
    fitted = plan.fits
    if not fitted:
        found = smallest_change(recipe, plan, make)
        if found is None:
            print("no change of remat, accumulation, fsdp or batch fits; choose more chips or a smaller model")
            return EXIT_DOES_NOT_FIT
        change, plan = found
        print(f"\nthe smallest change that fits: {as_flags(change)}\n{plan.table(MFU.value)}")
        recipe = changed(recipe, change)
    if SEARCH.value:
        change, best = lowest_bound(recipe, plan, make)
        if best is plan:
            print("\nno other accumulation, fsdp or remat that was tried has a lower bound")
        else:
            print(f"\nthe lowest bound: {as_flags(change)}\n{best.table(MFU.value)}")
    return 0 if fitted else EXIT_DOES_NOT_FIT


def make_plan(topology: Topology, recipe: Recipe) -> Plan:
    """Compiles the program that the flags name; ValueError, naming what can be, if the batch cannot be sharded."""
    try:
        mesh = recipe.mesh(topology.devices)
    except ValueError as error:
        options = dividing_options(recipe, len(topology.devices))
        raise UserError(f"{error}; here: {' or '.join(map(as_flags, options))}") from error
    program = train_program
    if SAMPLER.value:
        program = student_program if recipe.student else sample_program
    return compile_program(program(recipe, mesh), recipe, topology, mesh)


def _config() -> ConfigDict:
    """The flow's recipe, with the student's network if one is planned for."""
    if DECODER.value == "sequential":
        if STUDENT.value is not None:
            raise UserError("--student is the recipe of a sampler; add --sampler --decoder=student")
        return CONFIG.value
    if STUDENT.value is None or not SAMPLER.value:
        raise UserError("--decoder=student takes --sampler and --student, such as configs/student/digits.py")
    config = ConfigDict(CONFIG.value)
    with config.unlocked():
        config.student = with_flow(STUDENT.value, config).student
    return config


if __name__ == "__main__":
    common.run(main)
