"""STARFlow's block, prefix and weights compute what its reference computed; each option also works by itself."""

import dataclasses
import functools
import itertools
import math
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.convert import in_a_file
from lazy import Lazy
from tarflow_jax import Guidance, TarFlowConfig, TarFlowPipeline
from tarflow_jax.errors import UserError
from tarflow_jax.flow import block_orders
from tarflow_jax.interop import load_torch, save_torch
from tarflow_jax.interop.torch_weights import STARFLOW
from tarflow_jax.runtime import LocalBatch, make_mesh
from tarflow_jax.runtime.parameters import params_shapes
from tarflow_jax.sampling import GaussSeidelJacobi, Jacobi
from tarflow_jax.student import Student, StudentConfig
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.step import TrainConfig, compiled_step, new_state
from tarflow_jax.training.task import Arrays, ArrayTask
from test_interop_convert import convert
from test_interop_goldens import assert_close
from tiny_models import TINY, random_variables

torch = Lazy("torch")
CASES = ("starflow_plain", "starflow_label", "starflow_text")
QUICK = ("starflow_label", None)
DECODERS = (None, Jacobi(tolerance=0), GaussSeidelJacobi(3, tolerance=0))


@functools.cache
def pipeline(load_golden, name):
    """The golden, the pipeline of its weights, and what it is conditional on."""
    golden = load_golden(name)
    config, prefix = golden.config, golden.arrays.get("prefix")
    pipe = TarFlowPipeline.from_torch(
        golden.path, config.image_size, config.image_channels, config.patch_size, noise_std=0.3
    )
    return golden, pipe, {} if prefix is None else {"condition": prefix}


@pytest.mark.parametrize(
    "name", ["starflow_label", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != QUICK[0])]
)
def test_encoding_likelihood_and_denoising(load_golden, name):
    golden, pipe, given = pipeline(load_golden, name)
    images = golden.images("x")
    latents, log_det = pipe.encode(images, **given)
    assert_close(latents, golden.images("z"))
    assert_close(log_det, golden.arrays["logdet_per_dim"] * golden.config.num_dims)
    assert_close(pipe.log_prob(images, **given), golden.arrays["log_prob"])
    assert_close(pipe.denoise(images, **given), golden.images("denoised"))


@pytest.mark.parametrize(
    ("name", "decoder"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(CASES, DECODERS) if case != QUICK]
    + [QUICK],
    ids=str,
)
def test_samples(load_golden, name, decoder):
    golden, pipe, given = pipeline(load_golden, name)
    noise = golden.images("noise")
    trace = pipe.decode_trace(noise, decoder=decoder, **given)
    assert_close(trace.images, golden.images("sample"))
    assert_close(np.moveaxis(trace.trajectory, 1, 0)[1:], golden.images("sample_sequence"))
    if given:
        guidance = Guidance(3.6, rule="product", schedule="constant", blocks=1 if name == "starflow_text" else "all")
        null = golden.arrays["prefix_null"][0]
        guided = pipe.decode(noise, guidance=guidance, decoder=decoder, null_condition=null, **given)
        assert_close(guided, golden.images("sample_w3.6"))


@pytest.mark.slow
def test_the_reference_s_training_run_on_a_mesh(load_golden):
    golden = load_golden("starflow_training")
    optimizer = Optimizer(20, 1e-3, 1e-3, 0, 0.9, 0.95, 1e-4, 0.0, 0.0, "adamw", 0.0)
    train_config = TrainConfig(ArrayTask(golden.config, block_penalty=1e-4), optimizer)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, put = new_state(train_config, mesh, jax.random.key(0)), LocalBatch(mesh, 8).put
    # Copies, because the step reuses the memory of what it is given.
    given = jax.tree.map(
        lambda new, old: jax.device_put(np.array(new), old.sharding), golden.variables, state.variables
    )
    state, step, losses = state.replace(variables=given), compiled_step(train_config, mesh), []
    for batch in zip(golden.images("x"), golden.arrays["prefix"], strict=True):
        state, metrics = step(state, Arrays(*map(put, batch)), None, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, golden.arrays["losses"], rtol=2e-4)


SHORT = TarFlowConfig(sequence_shape=(4, 2), width=16, head_dim=8, num_blocks=2, layers_per_block=(1, 2))
PREFIX = {"condition_kind": "prefix", "condition_dim": 3, "condition_length": 2}
OPTIONS = {
    "start_token": {"start_token": True},
    "single token": {"start_token": True, "sequence_shape": (1, 3), "triangular": True},
    "softplus": {"scale_function": "softplus", "output_limit": 1.0, "triangular": True},
    "final_norm": {"final_norm": True, "position_init": "none", "orders": "backwards_first"},
    "slots": {"rotary": True, "rotary_base_size": 3},
    "by token": {"start_token": True, "condition_kind": "tokens", "condition_dim": 3, "orders": "random"},
    "some blocks": {"condition_kind": "tokens", "condition_dim": 3, "condition_blocks": 1, "rotary": True},
    "prefix": {"rotary": True, "noise_conditional": True, **PREFIX},
    "all": {
        "rotary": True,
        "rotary_base_size": 3,
        "start_token": True,
        "condition_blocks": 1,
        "num_classes": 2,
        **PREFIX,
    },
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS if name != "all"]


def short_flow(name):
    config = dataclasses.replace(SHORT, **OPTIONS[name])
    variables = random_variables(config)
    rng = np.random.default_rng(0)
    given = {"condition": rng.normal(size=(3, *config.condition_shape))} if config.condition_dim else {}
    given |= {"noise_std": [0.1, 0.2, 0.3]} if config.noise_conditional else {}
    given |= {"labels": np.array([0, -1, 1])} if config.num_classes else {}
    return TarFlowPipeline(config, variables), rng.normal(size=(3, *config.data_shape)).astype(np.float32), given


@pytest.mark.parametrize("name", ["all", *SLOW])
def test_every_option_gives_a_flow_that_all_decoders_invert(name):
    pipe, x, given = short_flow(name)
    latents, log_det = pipe.encode(x, **given)

    first = {name: values[:1] for name, values in given.items()}
    one = lambda x: pipe.encode(x[None], **first)[0].ravel()  # noqa: E731
    jacobian = jax.jit(jax.jacfwd(one))(x[0]).reshape(x[0].size, x[0].size)
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], log_det[0], atol=1e-4)
    for decoder in (None, Jacobi(tolerance=0), GaussSeidelJacobi(min(2, max(pipe.config.sequence_length - 1, 1)), 0)):
        np.testing.assert_allclose(pipe.decode(latents, decoder=decoder, **given), x, atol=1e-4)
    if pipe.config.num_tokens > 1:
        lengths = np.array([4, 2, 1])
        short, _ = pipe.encode(x, mask=lengths, **given)
        exists, moved = np.arange(4)[None, :, None] < lengths[:, None, None], dict(given)
        if pipe.config.condition_by_token:
            moved["condition"] = np.where(exists, given["condition"], 9.0)
        chex.assert_trees_all_equal(pipe.encode(np.where(exists, x, 9.0), mask=lengths, **moved)[0], short)
        np.testing.assert_allclose(pipe.decode(short, mask=lengths, **given)[2, 0], x[2, 0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "by token"])
def test_guidance_leads_away_from_the_null_condition(name):
    pipe, latents, given = short_flow(name)
    null = np.full(pipe.config.condition_shape, 0.7, np.float32)
    everywhere = np.broadcast_to(null, (3, *null.shape))
    given.pop("labels", None)
    there = Guidance(-1.0, schedule="constant")  # at this weight, the guided map is the unguided pass's
    found = pipe.decode(latents, guidance=there, null_condition=null, **given)
    np.testing.assert_allclose(found, pipe.decode(latents, condition=everywhere), atol=1e-4)
    np.testing.assert_array_equal(pipe.decode(latents, guidance=there, null_condition=everywhere, **given), found)
    default = pipe.decode(latents, guidance=there, **given)
    np.testing.assert_allclose(default, pipe.decode(latents), atol=1e-4)
    assert float(jnp.abs(default - found).max()) > 1e-3
    last = pipe.decode(latents, guidance=Guidance(1.0, rule="product", schedule="linear"), **given)
    assert float(jnp.abs(last - pipe.decode(latents, **given)).max()) > 1e-3
    with pytest.raises(UserError, match="null_condition has shape"):
        pipe.decode(latents, null_condition=null[:, :2], **given)


@pytest.mark.slow
def test_a_model_s_own_null_prefix_stands_in_for_a_missing_one(tmp_path):
    pipe, x, given = short_flow("all")
    null = np.full((2, 3), 0.7, np.float32)
    variables = {**pipe.variables, "constants": {**pipe.variables["constants"], "null_prefix": null}}
    TarFlowPipeline(pipe.config, variables).save_pretrained(tmp_path / "model")
    own = TarFlowPipeline.from_pretrained(tmp_path / "model")
    everywhere = np.broadcast_to(null, (3, 2, 3))
    np.testing.assert_allclose(own.log_prob(x), pipe.log_prob(x, condition=everywhere), atol=1e-5)
    guidance = Guidance(2.0, schedule="constant")
    np.testing.assert_allclose(
        own.decode(x, guidance=guidance, **given),
        pipe.decode(x, guidance=guidance, null_condition=null, **given),
        atol=1e-4,
    )


def test_blocks_read_backwards_first():
    orders = block_orders(dataclasses.replace(SHORT, orders="backwards_first"), {})
    np.testing.assert_array_equal(orders, [[3, 2, 1, 0], [0, 1, 2, 3]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**PREFIX, "condition_length": 0}, "a 'prefix' has both"),
        ({"condition_length": 2}, "a 'prefix' has both"),
    ],
)
def test_options_that_contradict_each_other_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SHORT, **fields)


def test_a_student_learns_from_a_flow_with_a_start_token_and_not_with_a_condition():
    flow = dataclasses.replace(TINY, start_token=True, final_norm=True, position_init="none", output_limit=2.0)
    config = StudentConfig(flow, layers_per_block=1)
    images = jnp.zeros((1, *flow.image_shape))
    assert "start_token" not in jax.eval_shape(Student(config).init, jax.random.key(0), images)["params"]["block_0"]
    with pytest.raises(UserError, match="which no student takes"):
        StudentConfig(dataclasses.replace(TINY, condition_dim=2), layers_per_block=1)


@pytest.mark.slow
def test_weights_are_read_onto_a_mesh(load_golden):
    golden, pipe, given = pipeline(load_golden, "starflow_text")
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharded = TarFlowPipeline.from_torch(golden.path, (8, 10), 4, 1, mesh=mesh)
    chex.assert_trees_all_equal(jax.device_get(sharded.variables), jax.device_get(pipe.variables))
    kernel = sharded.variables["params"]["block_3"]["layers"]["mlp_in"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 64, 256)
    assert_close(sharded.log_prob(golden.images("x"), **given), golden.arrays["log_prob"])
    assert_close(sharded.decode(golden.images("noise"), **given), golden.images("sample"))


@pytest.mark.parametrize("name", [*CASES, "starflow_training"])
def test_weights_go_to_pytorch_and_back_bit_for_bit(load_golden, tmp_path, name):
    golden = load_golden(name)
    save_torch(tmp_path / "back.pth", golden.config, golden.variables)
    reference, back = (torch.load(path, weights_only=True) for path in (golden.path, tmp_path / "back.pth"))
    assert back.keys() == reference.keys()
    assert all(torch.equal(back[tensor], reference[tensor]) for tensor in reference)


def test_positions_and_directions_that_no_tensor_tells_are_arguments(load_golden):
    golden = load_golden("starflow_text")
    read = functools.partial(load_torch, golden.path, (8, 10), 4, 1)
    assert golden.config.rotary_base_size == 8
    assert golden.config.orders == "backwards_first"
    other, variables = read(base_size=12, orders="alternate")
    assert other == dataclasses.replace(golden.config, rotary_base_size=12, orders="alternate")
    chex.assert_trees_all_equal(variables, golden.variables)
    with pytest.raises(UserError, match="is no STARFlow; leave base_size and orders out"):
        load_torch(load_golden("cond").path, 12, 1, 3, base_size=4)


def drop_mask(state):
    state["blocks.0.attn_mask"] = state["blocks.0.attn_mask"][:3]


def add_denoiser(state):
    state["learnable_self_denoiser.proj_in.weight"] = torch.zeros(4, 4)


def turn(state):
    state["feat_rope.freqs_cos"] += 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_mask, "not a TarFlow of the reference"),
        (add_denoiser, "has tensor learnable_self_denoiser.proj_in.weight, which no model"),
        (turn, "buffer feat_rope.freqs_cos has other values"),
        (lambda state: state.pop("blocks.1.sos_embed"), "lacks tensor blocks.1.sos_embed"),
        (lambda state: state.pop("blocks.2.proj_txt.bias"), "lacks tensor blocks.2.proj_txt.bias"),
        (lambda state: [state.pop(f"blocks.2.proj_txt.{kind}") for kind in ("weight", "bias")], "lacks tensor"),
    ],
)
def test_other_files_are_refused_in_a_line(load_golden, tmp_path, spoil, message):
    state = torch.load(load_golden("starflow_label").path, weights_only=True)
    spoil(state)
    torch.save(state, tmp_path / "spoilt.pth")
    with pytest.raises(UserError, match=message) as error:
        load_torch(tmp_path / "spoilt.pth", 8, 4, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields", [{"final_norm": False}, {"rotary_base_size": 0}, {"num_classes": 3}, {"triangular": True}]
)
def test_what_starflow_cannot_hold_is_not_written(load_golden, tmp_path, fields):
    config = dataclasses.replace(load_golden("starflow_plain").config, **fields)
    with pytest.raises(UserError, match="the PyTorch reference has"):
        save_torch(tmp_path / "x.pth", config, {})


def test_the_released_model_of_text_has_its_number_of_parameters():
    prefix = {"condition_kind": "prefix", "condition_dim": 2048, "condition_length": 128, "condition_blocks": 1}
    config = TarFlowConfig((32, 32), 4, 1, 3072, 6, (2, 2, 2, 2, 2, 24), rotary_base_size=32, **STARFLOW, **prefix)
    assert round(sum(map(math.prod, params_shapes(config).values())) / 1e9, 3) == 3.858


def test_one_variable_at_a_time_is_in_memory(load_golden):
    path = load_golden("starflow_text").path
    tracemalloc.start()
    load_torch(path, (8, 10), 4, 1, place=lambda tree: jax.tree.map(functools.partial(in_a_file, None), tree))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 3


@pytest.mark.slow
def test_the_command_converts_what_is_not_square(load_golden, tmp_path):
    golden, pipe, _ = pipeline(load_golden, "starflow_text")
    shape = ["--image_size=8", "--image_size=10", "--image_channels=4", "--patch_size=1", "--noise_std=0.3"]
    done = convert(f"--from_torch={golden.path}", f"--out={tmp_path / 'model'}", *shape)
    assert (done.returncode, done.stderr) == (0, "")
    again = TarFlowPipeline.from_pretrained(tmp_path / "model")
    assert again.config == pipe.config
    assert again.config.image_bits == 0  # latents
    chex.assert_trees_all_equal(again.variables, pipe.variables)
