"""Plans of recipes, compiled for CPU devices and for TPUs that are not here, and changes of those that do not fit."""

import dataclasses
import json
import math

import commands
import jax
import jax.numpy as jnp
import pytest

from configs import digits
from configs.student import digits as student_digits
from tarflow_jax.flow import TarFlow
from tarflow_jax.flow.attention import choose_kernel
from tarflow_jax.planning import (
    Plan,
    compile_program,
    known_chip,
    open_topology,
    sample_program,
    student_program,
    train_program,
)
from tarflow_jax.planning.changes import as_flags, changed, changes, dividing_options, lowest_bound, smallest_change
from tarflow_jax.planning.chips import Chip
from tarflow_jax.planning.flops import forward_flops, program_flops
from tarflow_jax.planning.traffic import Collective, Traffic
from tarflow_jax.runtime import make_mesh
from tarflow_jax.runtime.parameters import student_shapes
from tarflow_jax.sampling.blocks import layers_as
from tarflow_jax.student.network import NUM_WAVES
from tarflow_jax.training import Recipe


def tiny_recipe(**fields):
    config = digits.get_config("smoke")
    plain = {"model.triangular": False, "optimizer.name": "adamw", "optimizer.muon_learning_rate": 0.0}
    config.update_from_flattened_dict({"model.remat": "none", "model.num_blocks": 1, **plain, **fields})
    return Recipe(config)


def plan_of(recipe, topology):
    mesh = recipe.mesh(topology.devices)
    return compile_program(train_program(recipe, mesh), recipe, topology, mesh)


def test_the_plan_of_a_training_step_on_eight_cpu_devices():
    recipe, topology = tiny_recipe(), open_topology("cpu:8")
    plan = plan_of(recipe, topology)
    model, batch = recipe.model, recipe.config.train.batch_size
    adamw = recipe.train_config.optimizer.transformation()
    parameters = jax.eval_shape(lambda: adamw.init({"w": jnp.ones(())}))  # two moments, two counters
    assert len(jax.tree.leaves(parameters)) == 4
    assert plan.state_bytes["optimizer"] == 2 * plan.state_bytes["parameters"] + 3 * 4
    assert plan.state_bytes["batch"] == batch // 8 * (model.num_dims + 4)
    tokens, width, heads_width = 16, 64, 64
    layer = 12 * width**2 + 2 * tokens * heads_width  # qkv, out, MLP; the two products of attention
    ends = width * (4 + 2 * 4)  # from tokens of 4 numbers, to a scale and a shift of each
    assert forward_flops(model) == 2 * tokens * (layer + ends)
    # Backwards is twice forwards, but that the images need no gradient.
    assert plan.flops * 8 == batch * (3 * forward_flops(model) - 2 * tokens * width * 4)
    triangular = dataclasses.replace(model, triangular=True)
    flow, images = TarFlow(triangular), jnp.zeros((1, *model.image_shape))
    program = jax.make_jaxpr(flow.apply)(jax.eval_shape(flow.init, jax.random.key(0), images), images)
    assert program_flops(program) == forward_flops(triangular)
    # Every parameter's gradient is summed once; so are a few numbers for the metrics.
    gradients = 2 * 7 / 8 * plan.state_bytes["parameters"]
    assert gradients <= plan.traffic.collectives["all-reduce"].bytes < gradients + 2000
    assert plan.fits
    assert plan.limits == {}  # this processor's peak is in no table
    assert json.loads(json.dumps(plan.figures()))["topology"] == "cpu:8"


@pytest.mark.slow
def test_accumulated_gradients_cross_the_devices_once():
    def reduced(accumulation):
        recipe = tiny_recipe(**{"train.batch_size": 32, "train.accumulation": accumulation})
        return plan_of(recipe, open_topology("cpu:8")).traffic.collectives["all-reduce"].bytes

    assert reduced(4) == pytest.approx(reduced(1), rel=0.01)


def test_a_sampler_gathers_sharded_parameters_once():
    recipe = tiny_recipe(**{"mesh.data": 1, "mesh.fsdp": 8, "model.num_blocks": 2})
    topology = open_topology("cpu:8")
    mesh = recipe.mesh(topology.devices)
    plan = compile_program(sample_program(recipe, mesh), recipe, topology, mesh)
    gathered = plan.traffic.collectives["all-gather"].bytes
    assert 6 * plan.state_bytes["parameters"] < gathered < 7 * plan.state_bytes["parameters"]
    assert plan.traffic.collectives.keys() == {"all-gather"}


def test_the_plan_of_a_student_s_pass_on_eight_cpu_devices():
    config = tiny_recipe(**{"model.num_blocks": 2}).config
    config.student = student_digits.get_config("smoke").student
    recipe, topology = Recipe(config), open_topology("cpu:8")
    mesh = recipe.mesh(topology.devices)
    plan = compile_program(student_program(recipe, mesh), recipe, topology, mesh)
    tokens, width, patch, layers = 16, 64, 4, 3
    ends = 3 * (patch + 2 * patch)  # of each block, a projection and the shift and scale of a token
    by_hand = 2 * tokens * (ends * width + layers * (12 * width**2 + 2 * tokens * width))
    guidance = 3 * 2 * NUM_WAVES * width  # of each image in each block
    assert plan.flops * 8 == recipe.config.train.batch_size * (by_hand + guidance)
    assert plan.model_flops == recipe.config.train.batch_size * by_hand
    assert plan.state_bytes["parameters"] == 4 * sum(map(math.prod, student_shapes(recipe.student).values()))
    assert plan.traffic.collectives == {}
    assert plan.fits


def test_changes_are_tried_from_the_smallest_to_the_largest():
    recipe = tiny_recipe(**{"train.batch_size": 64, "mesh.data": 8})
    topology = dataclasses.replace(open_topology("cpu:8"), chip=Chip(1000))
    whole = Plan(topology, {"data": 8, "fsdp": 1, "tensor": 1}, 64, 20, "", {"parameters": 500}, 900, 0, 1, 1,
                 Traffic(0, {}), 1)  # fmt: skip

    def compiled(changed):
        tried.append(changed.config.train.accumulation)
        return dataclasses.replace(whole, temporary_bytes=1600 / tried[-1])

    tried = []
    found = smallest_change(recipe, whole, compiled)
    assert as_flags(found[0]) == "--config.model.remat=full --config.train.accumulation=4"
    assert tried == [1, 2, 4]
    # Where the state alone is too large, only cutting it can help.
    state = dataclasses.replace(whole, state_bytes={"parameters": 2000})
    names = [as_flags(change) for change in changes(recipe, state)]
    assert names[0] == "--config.model.remat=full --config.mesh.data=4 --config.mesh.fsdp=2"
    assert all("fsdp" in name for name in names)
    assert smallest_change(recipe, state, lambda changed: state) is None


def test_the_lowest_bound_is_searched_for():
    recipe = tiny_recipe(**{"train.batch_size": 64, "mesh.data": 8, "model.remat": "full"})
    topology = dataclasses.replace(open_topology("cpu:8"), chip=Chip(1000, flops=10, memory_rate=100))
    tried = []

    def compiled(changed):
        fields = changed.config
        tried.append((fields.train.accumulation, fields.model.remat, fields.mesh.fsdp))
        # Parts of 16 images stay on the chip, of fewer read the weights too often; not recomputing does not fit.
        moved = {1: 900, 2: 700, 4: 600, 8: 800}[fields.train.accumulation]
        room = {"full": 100, "none": 300}[fields.model.remat]
        mesh = {"data": fields.mesh.data, "fsdp": fields.mesh.fsdp, "tensor": 1}
        moved += 1000 * (fields.mesh.fsdp - 1) - 50 * (fields.model.remat == "none")
        return Plan(topology, mesh, 64, 20, "", {"parameters": 500}, room, 0, 1, 1, Traffic(moved, {}), 1)

    change, plan = lowest_bound(recipe, compiled(recipe), compiled)
    assert change == {"train.accumulation": 4, "model.remat": "none"}
    assert plan.bound == 5.5
    assert len(tried) == len(set(tried)) < 14
    assert lowest_bound(changed(recipe, change), plan, compiled) == (change, plan)


def test_a_step_takes_as_long_as_its_slowest_resource_or_its_products():
    chip = Chip(1000, flops=10, memory_rate=100, link_rate=5, network_rate=2)
    topology = dataclasses.replace(open_topology("cpu:8"), chip=chip)
    moved = {"all-reduce": Collective(1, bytes=20, network_bytes=6), "all-gather": Collective(1, bytes=5)}
    plan = Plan(topology, {"data": 8}, 16, 20, "", {"parameters": 300, "batch": 200}, 400, 50, 30, 160,
                Traffic(250, moved), 1)  # fmt: skip
    assert plan.limits == {"products": 3, "memory": 2.5, "links": 5, "network": 3}
    assert plan.step_seconds(mfu=0.25) == 160 / 8 / 10 / 0.25
    assert plan.step_seconds(mfu=0.5) == 5
    assert (plan.total_bytes, plan.fits) == (950, True)
    assert not dataclasses.replace(plan, code_bytes=101).fits
    too_large = dataclasses.replace(plan, problem="out of memory")
    assert (too_large.limits, too_large.fits) == ({}, False)


def test_meshes_that_divide_the_batch_are_named():
    recipe = tiny_recipe(**{"model.width": 1024, "train.batch_size": 480})
    assert [as_flags(option) for option in dividing_options(recipe, 256)] == [
        "--config.mesh.data=32 --config.mesh.tensor=8",
        "--config.train.batch_size=512",
    ]


def test_chips_are_known_by_the_longest_name():
    assert known_chip("TPU v5 lite").flops == 197e12
    assert known_chip("TPU v5").flops == 459e12
    assert known_chip("NVIDIA H100 80GB HBM3").memory_rate == 3350e9
    assert known_chip("abacus") is None
    with pytest.raises(ValueError, match="there are 8 cpu devices"):
        open_topology("cpu:9")


@pytest.mark.slow
def test_the_command_exits_with_2_and_names_a_change(tmp_path):
    # The activations of 4,096 images take more than this memory, those of a half or a quarter of them less.
    program = (
        "import os, runpy; real = os.sysconf; "
        "os.sysconf = lambda name: 400 * 2**20 // real('SC_PAGE_SIZE') if name == 'SC_PHYS_PAGES' else real(name); "
        "runpy.run_module('launch.plan', run_name='__main__', alter_sys=True)"
    )
    flags = [
        "--config=configs/digits.py:smoke",
        "--config.train.batch_size=4096",
        "--config.model.num_blocks=1",
    ]
    written = tmp_path / "plans.jsonl"
    code, out, err = commands.run("-c", program, *flags, "--topology=cpu:1", f"--json={written}")
    assert code == 2, err
    assert "the smallest change that fits: --config.train.accumulation=" in out
    assert not json.loads(written.read_text())["fits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"), [("--sampler", "leave out --sampler"), ("--mfu=0.4", "compares times, and cpu:1 has no rates")]
)
def test_what_cannot_be_searched_is_refused(flag, message):
    code, _, err = commands.run(
        "-m", "launch.plan", "--config=configs/digits.py:smoke", "--topology=cpu:1", "--search", flag
    )
    assert code == 1
    assert message in err


@pytest.mark.slow
def test_a_step_with_splash_compiles_for_tpus_that_are_not_here():
    pytest.importorskip("libtpu")
    topology = open_topology("v5e:2x2")
    recipe = tiny_recipe(
        **{"model.image_size": (16, 8), "model.patch_size": 1, "model.attention": "splash", "mesh.fsdp": 2}
    )
    mesh = recipe.mesh(topology.devices)
    program = train_program(recipe, mesh)
    plan = compile_program(program, recipe, topology, mesh)
    assert plan.fits
    assert plan.mesh == {"data": 2, "fsdp": 2, "tensor": 1}
    assert plan.limits.keys() == {"products", "memory", "links"}
    assert plan.limits["products"] == plan.flops / 197e12
    assert plan.step_seconds(mfu=0.4) == max(plan.model_flops / (4 * 197e12) / 0.4, *plan.limits.values())
    assert "tpu_custom_call" in program.program.trace(*program.arguments).lower().as_text()
    with pytest.raises(ValueError, match="no TPU topology 'v5e:3x5'"):
        open_topology("v5e:3x5")


@pytest.mark.slow
def test_a_sampler_compiles_for_tpus_that_are_not_here():
    pytest.importorskip("libtpu")
    recipe, topology = tiny_recipe(), open_topology("v5e:2x2")
    mesh = recipe.mesh(topology.devices)
    plan = compile_program(sample_program(recipe, mesh), recipe, topology, mesh)
    assert plan.fits
    assert set(plan.state_bytes) == {"parameters", "batch"}
    assert "the whole recipe" not in plan.table(mfu=0.4)


@pytest.mark.slow
def test_meshes_of_tpus_and_the_kernel_for_them():
    pytest.importorskip("libtpu")
    slices = make_mesh(4, 2, 1, devices=open_topology("v5e:2x2", num_slices=2).devices)
    assert [device.slice_index for device in slices.devices.flat] == [0] * 4 + [1] * 4
    with jax.set_mesh(slices):
        assert choose_kernel("auto", 1024, jnp.dtype("bfloat16")) == "splash"
        assert [layers_as(num_tokens) for num_tokens in (256, 1024)] == ["unrolled", "looped"]
    assert layers_as(1024) == "unrolled"
    with pytest.raises(ValueError, match="2 slices"):
        make_mesh(1, 8, 1, devices=slices.devices.flatten())
    make_mesh(8, 1, 8, devices=open_topology("v5p:4x4x4").devices)  # 8 is no product of 4 x 4 x 4's axes
