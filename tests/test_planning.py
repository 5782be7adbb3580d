"""Plans of recipes for CPU devices and for TPUs that are not here."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest

import commands
from benchmarks.collectives import collectives
from benchmarks.hlo_traffic import compiled_text
from configs import digits
from tarflow_jax.planning import Plan, forward_flops, make_plan, open_topology
from tarflow_jax.runtime import make_mesh
from tarflow_jax.runtime.kernels import choose_kernel
from tarflow_jax.runtime.parameters import variables_shapes
from tarflow_jax.training import Recipe


def tiny_recipe(**fields):
    config = digits.get_config("smoke")
    plain = {"model.triangular": False, "optimizer.name": "adamw", "optimizer.muon_learning_rate": 0.0}
    config.update_from_flattened_dict({"model.remat": "none", "model.num_blocks": 1, **plain, **fields})
    return Recipe(config)


@functools.cache
def sent(accumulation=1):
    """The collectives of a training step on eight devices."""
    recipe = tiny_recipe(**{"train.accumulation": accumulation})
    return collectives(compiled_text(recipe, open_topology("cpu:8"), sampler=False)[1], 8)


@pytest.mark.slow
def test_the_plan_of_a_training_step_on_eight_cpu_devices():
    recipe = tiny_recipe()
    plan = make_plan(recipe, open_topology("cpu:8"))
    model, batch = recipe.model, recipe.config.train.batch_size
    parameters = plan.state_bytes["parameters"]
    assert plan.state_bytes["optimizer"] == 2 * parameters + 2 * 4  # AdamW's two moments and two counters
    assert plan.state_bytes["EMA"] == 0
    assert plan.state_bytes["batch"] == batch // 8 * (model.num_dims + 4)
    tokens, width = 16, 64
    layer = 12 * width**2 + 2 * tokens * width  # queries to MLP; the two matmuls of attention
    ends = width * (4 + 2 * 4)  # from tokens of 4 numbers, to a scale and a shift of each
    assert forward_flops(model) == 2 * tokens * (layer + ends)
    # The backward pass is twice the forward pass, except that images need no gradient.
    assert plan.flops * 8 == batch * (3 * forward_flops(model) - 2 * tokens * width * 4)
    assert plan.model_flops * 8 == batch * 3 * forward_flops(model)
    # Every parameter's gradient is summed once; so are a few numbers for the metrics.
    gradients = 2 * 7 / 8 * parameters
    assert gradients <= sent()["all-reduce"].bytes < gradients + 2000
    assert plan.fits
    assert "MFU" not in plan.table(mfu=0.4)  # this processor's peak is in no table
    assert json.loads(json.dumps(dataclasses.asdict(plan)))["topology"] == "cpu:8"


def test_flops_of_a_triangular_model():
    plain = tiny_recipe().model
    triangular = dataclasses.replace(plain, triangular=True)
    numbers = triangular.triangle_size  # predicted for each of 16 tokens of 4 numbers, and applied by two matmuls
    assert forward_flops(triangular) - forward_flops(plain) == 2 * 16 * (64 * numbers + 2 * 4 * numbers)


@pytest.mark.slow
def test_accumulated_gradients_cross_the_devices_once():
    reduced, in_microbatches = (sent(n)["all-reduce"].bytes for n in (1, 2))
    assert in_microbatches == pytest.approx(reduced, rel=0.01)


def test_a_sampler_gathers_sharded_parameters_once():
    recipe = tiny_recipe(**{"mesh.data": 1, "mesh.fsdp": 8, "model.num_blocks": 2})
    _, text = compiled_text(recipe, open_topology("cpu:8"), sampler=True)
    ((kind, gathered),) = collectives(text, 8).items()
    parameters = sum(4 * math.prod(shape) for shape in variables_shapes(recipe.model).values())
    assert kind == "all-gather"
    assert 6 / 8 * parameters < gathered.bytes < 7 / 8 * parameters


PLAN = Plan(
    topology="v5e:2x4",
    device_memory=1000,
    device_flops=10.0,
    mesh={"data": 8, "fsdp": 1, "tensor": 1},
    batch_size=64,
    num_steps=3600,
    state_bytes={"parameters": 300, "batch": 200},
    flops=30.0,
    model_flops=20.0,
    temporary_bytes=400.0,
    code_bytes=50.0,
)


def test_what_fits():
    assert (PLAN.total_bytes, PLAN.fits) == (950, True)
    assert not dataclasses.replace(PLAN, code_bytes=101).fits
    too_large = dataclasses.replace(PLAN, problem="Used 20.1G", temporary_bytes=float("nan"), code_bytes=float("nan"))
    assert not too_large.fits
    assert "Used 20.1G: does not fit" in too_large.table(mfu=0.5)


def test_hours_at_a_utilization():
    rows = dict(line.split(maxsplit=1) for line in PLAN.table(mfu=0.5).replace("at 50% MFU", "MFU").splitlines())
    assert rows["MFU"] == "4 s per step, 16 images/s"
    assert "4.0 hours, 32 device-hours" in rows["whole"]
    assert "hours" not in dataclasses.replace(PLAN, num_steps=0).table(mfu=0.5)


@pytest.mark.parametrize("name", ["cpu:9", "cpu:0", "cpu:many"])
def test_cpu_devices_that_are_not_here(name):
    with pytest.raises(ValueError, match="there are 8 cpu devices"):
        open_topology(name)


@pytest.mark.slow
def test_the_command_exits_with_2_if_the_recipe_does_not_fit(tmp_path):
    program = (
        "import os, runpy; real = os.sysconf; "
        "os.sysconf = lambda name: 2**20 // real('SC_PAGE_SIZE') if name == 'SC_PHYS_PAGES' else real(name); "
        "runpy.run_module('launch.plan', run_name='__main__', alter_sys=True)"
    )
    flags = ("--config=configs/digits.py:smoke", "--config.model.num_blocks=1", "--mesh=1,1,1", "--topology=cpu:1")
    written = tmp_path / "plans.jsonl"
    code, out, err = commands.run("-c", program, *flags, f"--json={written}")
    assert code == 2, err
    assert "of 1 MiB: does not fit" in out
    assert not json.loads(written.read_text())["fits"]


@pytest.mark.slow
def test_a_step_with_splash_compiles_for_tpus_that_are_not_here():
    pytest.importorskip("libtpu")
    topology = open_topology("v5e:2x2")
    splash = {"model.image_size": (16, 8), "model.patch_size": 1, "model.attention": "splash"}
    recipe = tiny_recipe(**splash, **{"mesh.fsdp": 2})
    plan = make_plan(recipe, topology)
    assert plan.fits
    assert plan.mesh == {"data": 2, "fsdp": 2, "tensor": 1}
    assert plan.device_flops == 197e12  # of "TPU v5 lite", not "TPU v5"
    assert "device-hours" in plan.table(mfu=0.4)
    traced, text = compiled_text(recipe, topology, sampler=False)
    assert {"all-gather", "all-reduce"} <= collectives(text, 4).keys()
    assert "tpu_custom_call" in traced.lower().as_text()
    with pytest.raises(ValueError, match="no topology 'v5e:3x5'"):
        open_topology("v5e:3x5")


@pytest.mark.slow
def test_a_sampler_compiles_for_two_slices_of_tpus_that_are_not_here():
    pytest.importorskip("libtpu")
    plan = make_plan(tiny_recipe(), open_topology("v5e:2x2", num_slices=2), sampler=True)
    assert plan.fits
    assert plan.mesh["data"] == 8


@pytest.mark.slow
def test_meshes_of_tpus_and_the_kernel_for_them():
    pytest.importorskip("libtpu")
    slices = make_mesh(4, 2, 1, devices=open_topology("v5e:2x2", num_slices=2).devices)
    assert [device.slice_index for device in slices.devices.flat] == [0] * 4 + [1] * 4
    with jax.set_mesh(slices):
        assert choose_kernel("auto", 1024, jnp.dtype("bfloat16")) == "splash"
    with pytest.raises(ValueError, match="2 slices"):
        make_mesh(1, 8, 1, devices=slices.devices.flatten())
    make_mesh(8, 1, 8, devices=open_topology("v5p:4x4x4").devices)  # 8 is no product of 4 x 4 x 4's axes
