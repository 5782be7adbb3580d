"""The autoencoder against diffusers' AutoencoderKL with random weights, and its files."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from damage import full_disk
from lazy import Lazy
from tarflow_jax.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderKL, trained
from tarflow_jax.autoencoder.weights import CONFIG, WEIGHTS, params_shapes
from tarflow_jax.errors import UserError
from tarflow_jax.interop.tensors import unflatten

torch, diffusers = Lazy("torch"), Lazy("diffusers")
STABLE_DIFFUSION = {  # at a quarter of its width
    "block_out_channels": (32, 64, 128, 128),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
TINY = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
GREY = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 8,
    "use_post_quant_conv": False,
    "scaling_factor": 0.5,
}


@functools.cache
def torch_model(**fields):
    """diffusers' model with random weights: also norms and biases, which it would leave at 1 and 0."""
    levels = len(fields["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AutoencoderKL(**fields, **blocks).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        else:
            parameter *= 1.5
        if name.startswith(("encoder.conv_in", "decoder.conv_in")):
            parameter *= 0.01  # so small that the norms' epsilon matters
        if name in ("quant_conv.bias", "encoder.conv_out.bias"):
            parameter[-2:] += torch.tensor([-70.0, 50.0])  # log variances out of range
    return model


def to_torch(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), 3, 1).copy())


def from_torch(x):
    return np.moveaxis(x.numpy(), 1, 3)


def images_of(config, batch_size=2, height=16, width=16, seed=0):
    shape = (batch_size, height, width, config.image_channels)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def latents_of(config, batch_size=2, height=8, width=8, seed=1):
    shape = (batch_size, height, width, config.latent_channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_equal_to(model, autoencoder, images, latents):
    """Compares unscaled means, log variances and images with diffusers'."""
    config = autoencoder.config
    posterior = model.encode(to_torch(images)).latent_dist
    mean, std = autoencoder.posterior(images)
    scale, shift = config.scaling_factor, config.shift_factor
    np.testing.assert_allclose(mean / scale + shift, from_torch(posterior.mean), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(2 * np.log(std / scale), from_torch(posterior.logvar), rtol=1e-4, atol=1e-4)
    decoded = from_torch(model.decode(to_torch(latents)).sample)
    np.testing.assert_allclose(autoencoder.decode((latents - shift) * scale), decoded, rtol=1e-4, atol=1e-4)
    assert decoded.std() > 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that diffusers wrote of the tiny model; tests do not change it."""
    folder = tmp_path_factory.mktemp("tiny")
    torch_model(**TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(folder):
    return Autoencoder.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of it, for tests that do."""
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def edit(folder, **changes):
    """Changes fields of config.json; removes those that are `...`."""
    fields = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def edit_tensors(folder, change):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "size"), [(STABLE_DIFFUSION, (32, 32)), (GREY, (24, 16))], ids=["sd", "grey"])
def test_it_equals_diffusers(fields, size, tmp_path):
    model = torch_model(**fields)
    model.save_pretrained(tmp_path)
    autoencoder = Autoencoder.from_pretrained(tmp_path)
    config = autoencoder.config
    latents = latents_of(config, 2, *(side // config.factor for side in size))
    assert_equal_to(model, autoencoder, images_of(config, 2, *size), latents)


def test_it_equals_diffusers_without_attention_and_quantisation(tiny):
    assert tiny.config.factor == 2
    assert tiny.config.shift_factor == TINY["shift_factor"]
    assert_equal_to(torch_model(**TINY), tiny, images_of(tiny.config), latents_of(tiny.config))


def test_the_defaults_are_stable_diffusions():
    config = AutoencoderConfig()
    shapes = params_shapes(config)
    assert sum(np.prod(shape) for shape in shapes.values()) == 83_653_863
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    images = jax.ShapeDtypeStruct((2, 64, 32, 3), jnp.float32)
    encode = functools.partial(AutoencoderKL(config).apply, method="encode")
    mean, log_variance = jax.eval_shape(encode, {"params": unflatten(arrays)}, images)
    assert mean.shape == log_variance.shape == (2, 8, 4, 4)


@pytest.mark.slow
def test_the_module_reconstructs(tiny):
    images = images_of(tiny.config)
    reconstructed = jax.jit(AutoencoderKL(tiny.config).apply)({"params": tiny.params}, images)
    np.testing.assert_allclose(reconstructed, tiny.decode(tiny.encode(images)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_diffusers_opens_what_it_saves(dtype, tiny, folder, tmp_path):
    autoencoder = Autoencoder(dataclasses.replace(tiny.config, dtype=dtype), tiny.params)
    autoencoder.save_pretrained(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [CONFIG, WEIGHTS]
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "new")
    before = torch_model(**TINY).state_dict()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    old, new = (json.loads((path / CONFIG).read_text()) for path in (folder, tmp_path / "new"))
    assert new["sample_size"] == model.config.sample_size == 512
    assert [name for name in old if name[:1] != "_" and old[name] != new.get(name)] == ["force_upcast", "sample_size"]
    again = Autoencoder.from_pretrained(tmp_path / "new", dtype=dtype)
    assert again.config == autoencoder.config
    jax.tree.map(np.testing.assert_array_equal, again.params, tiny.params)
    autoencoder.save_pretrained(tmp_path / "new")  # over the older one


@pytest.mark.slow
def test_it_reads_the_old_names_of_attention(tmp_path):
    torch_model(**GREY).save_pretrained(tmp_path / "vae")
    expected = Autoencoder.from_pretrained(tmp_path).params
    new_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(tensors):
        for name in [name for name in tensors if ".to_" in name]:
            array, old = tensors.pop(name), name
            for new in new_names:
                old = old.replace(new, new_names[new])
            tensors[old] = array

    edit_tensors(tmp_path / "vae", age)
    chex.assert_trees_all_equal(Autoencoder.from_pretrained(tmp_path).params, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_reads_half_precision(dtype, tiny, copy):
    edit_tensors(
        copy, lambda tensors: tensors.update({name: x.astype(jnp.dtype(dtype)) for name, x in tensors.items()})
    )
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), tiny.params)
    chex.assert_trees_all_equal(Autoencoder.from_pretrained(copy).params, rounded)


@pytest.mark.slow
def test_old_configs_lack_fields(tiny, copy):
    absent = ("sample_size", "force_upcast", "latents_mean", "latents_std", "shift_factor", "scaling_factor")
    edit(copy, **dict.fromkeys(absent, ...), _name_or_path="x")
    expected = dataclasses.replace(tiny.config, scaling_factor=0.18215, shift_factor=0.0)
    assert Autoencoder.from_pretrained(copy).config == expected
    edit(copy, shift_factor=None)
    assert Autoencoder.from_pretrained(copy).config == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny'; expected 'AutoencoderKL'"),
        ({"_class_name": ...}, "_class_name is None; expected"),
        ({"act_fn": "relu"}, "act_fn is 'relu'; expected 'silu'"),
        ({"out_channels": 4}, "out_channels is 4; expected 3"),
        (
            {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
            "down_block_types is .*Attn.*; expected",
        ),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types is .*; expected"),
        ({"latents_mean": [0.0] * 16}, "latents_mean is .*; expected None"),
        ({"block_out_channels": []}, "block_out_channels is empty"),
        ({"block_out_channels": [8, 18]}, r"norm_num_groups is 4; expected a divisor of .*\(8, 18\)"),
        ({"latent_channels": "16"}, "latent_channels is '16'; expected int"),
        ({"norm_num_groups": 0}, "norm_num_groups is 0; expected a number from 1"),
        ({"scaling_factor": 0}, "scaling_factor is 0; expected a positive number"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan; expected a finite number"),
        ({"patch_size": 2}, "image_channels is 0; expected a number from 1"),
        ({"patch_size": 2, "in_channels": 13, "out_channels": 13}, "in_channels is 13; expected 12"),
        ({"surprise": 1}, "unknown autoencoder field 'surprise'"),
        ({"layers_per_block": 2}, "lacks tensor .*resnets"),
        ({"use_quant_conv": True}, "lacks tensor quant_conv"),
        ({"latent_channels": 8}, "tensor .* has shape .*; expected"),
    ],
)
def test_other_configs_are_refused_in_a_line(changes, message, copy):
    edit(copy, **changes)
    with pytest.raises(UserError, match=message) as error:
        Autoencoder.from_pretrained(copy)
    assert str(copy) in str(error.value)
    assert "\n" not in str(error.value)


OTHER_JSON = ["[]", "null", "{", "[" * 100_000, "\xff", '{"_class_name": "AutoencoderKL"}', " " * (1 << 20) + "{}"]


@pytest.mark.slow
@pytest.mark.parametrize("text", OTHER_JSON, ids=range(len(OTHER_JSON)))
def test_other_json_is_refused_in_a_line(text, copy):
    (copy / CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as error:
        Autoencoder.from_pretrained(copy)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(extra=np.zeros(3, np.float32)), "has tensor extra"),
        (lambda x: x.pop("decoder.conv_in.bias"), "lacks tensor decoder.conv_in.bias"),
        (lambda x: x.update({"decoder.conv_in.bias": np.zeros(3, np.float32)}), "decoder.conv_in.bias has shape"),
        (lambda x: x.update({"decoder.conv_in.bias": np.zeros(16, np.int32)}), "decoder.conv_in.bias is I32; expected"),
    ],
)
def test_other_tensors_are_refused(change, message, copy):
    edit_tensors(copy, change)
    with pytest.raises(UserError, match=message):
        Autoencoder.from_pretrained(copy)


@pytest.mark.slow
def test_damaged_files_are_refused_or_harmless(copy, damage):
    refused = []
    for name in (CONFIG, WEIGHTS):
        for path in damage(copy / name, 30):
            try:
                Autoencoder.from_pretrained(path.parent)
            except UserError as error:
                refused.append(str(error))
    assert len(refused) > 20
    assert not any("\n" in message for message in refused)


@pytest.mark.slow
def test_files_that_are_missing(copy):
    (copy / WEIGHTS).rename(copy / "diffusion_pytorch_model.bin")  # a pickle
    with pytest.raises(FileNotFoundError, match=f"no {WEIGHTS} in .*; expected"):
        Autoencoder.from_pretrained(copy)
    torch.save({"a": torch.zeros(3)}, copy / WEIGHTS)
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        Autoencoder.from_pretrained(copy)
    with pytest.raises(FileNotFoundError, match=f"no {CONFIG} in"):
        Autoencoder.from_pretrained(copy / "nowhere")
    with pytest.raises(UserError, match="folder is None"):
        Autoencoder.from_pretrained(None)


@pytest.mark.slow
def test_saving_replaces_no_other_model_and_fails_whole(tiny, tmp_path):
    (tmp_path / CONFIG).write_text('{"format": "tarflow_jax"}')
    with pytest.raises(UserError, match="_class_name is None"):
        tiny.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]
    other = tmp_path / "other"
    with full_disk(max_bytes=4096), pytest.raises(OSError, match="too large"):
        tiny.save_pretrained(other)
    assert not list(other.iterdir())


@pytest.mark.slow
def test_a_ragged_batch_is_no_new_program(tiny, monkeypatch):
    monkeypatch.setattr("tarflow_jax.runtime.batch_runner.usable_cores", lambda: 2)
    images = images_of(tiny.config, 6, height=8, width=12)
    latents = tiny.encode(images)
    before = trained._apply._cache_size()
    np.testing.assert_array_equal(tiny.encode(images[:5]), latents[:5])  # batches of 3, the last one padded
    assert trained._apply._cache_size() == before
    monkeypatch.setattr(tiny, "_runner", dataclasses.replace(tiny._runner, memory_bound=1))  # an image at a time
    np.testing.assert_allclose(tiny.encode(images), latents, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_close(tiny):
    half = Autoencoder(dataclasses.replace(tiny.config, dtype="bfloat16"), tiny.params)
    images, latents = images_of(tiny.config), latents_of(tiny.config)
    for name, given in (("encode", images), ("decode", latents)):
        exact, found = (np.asarray(getattr(each, name)(given)) for each in (tiny, half))
        assert found.dtype == np.float32
        error = np.sqrt(np.square(found - exact).mean()) / exact.std()
        assert 1e-4 < error < 0.02


@pytest.mark.slow
def test_a_key_draws_from_the_posterior(tiny):
    images = images_of(tiny.config)
    mean, std = tiny.posterior(images)
    np.testing.assert_array_equal(tiny.encode(images), mean)
    drawn = [np.asarray(tiny.encode(images, jax.random.key(seed))) for seed in range(2)]
    noise = jax.random.normal(jax.random.key(1), mean.shape)
    np.testing.assert_allclose(drawn[1], mean + std * noise, rtol=1e-6)
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("fields", [TINY, GREY], ids=["conv_out", "quant_conv"])
def test_a_constant_variance_holds_in_diffusers_too(fields, tmp_path):
    torch_model(**fields).save_pretrained(tmp_path)
    learned = Autoencoder.from_pretrained(tmp_path)
    config = dataclasses.replace(learned.config, latent_std=0.3)
    Autoencoder(config, learned.params).save_pretrained(tmp_path)
    again = Autoencoder.from_pretrained(tmp_path)
    assert again.config == config
    images = images_of(config)
    mean, std = again.posterior(images)
    np.testing.assert_allclose(std, np.full_like(std, 0.3 * config.scaling_factor), rtol=1e-5)
    np.testing.assert_allclose(mean, learned.encode(images), rtol=1e-5, atol=1e-6)
    posterior = diffusers.AutoencoderKL.from_pretrained(tmp_path).encode(to_torch(images)).latent_dist
    np.testing.assert_allclose(posterior.std.detach().numpy(), 0.3, rtol=1e-5)


@pytest.mark.slow
def test_patches_are_channels_of_diffusers_network(tmp_path):
    torch_model(**TINY | {"in_channels": 12, "out_channels": 12}).save_pretrained(tmp_path)
    network = Autoencoder.from_pretrained(tmp_path)
    config = dataclasses.replace(network.config, image_channels=3, patch_size=2)
    Autoencoder(config, network.params).save_pretrained(tmp_path)
    again = Autoencoder.from_pretrained(tmp_path)
    assert again.config == config
    assert config.factor == 4
    images = images_of(config)
    unfolded = images_of(network.config, 2, 8, 8).copy()
    for row in range(2):
        for column in range(2):
            start = 3 * (2 * row + column)
            unfolded[..., start : start + 3] = images[:, row::2, column::2]
    np.testing.assert_allclose(again.encode(images), network.encode(unfolded), atol=1e-5)
    decoded, unfolded = (np.asarray(each.decode(latents_of(config, 2, 4, 4))) for each in (again, network))
    np.testing.assert_allclose(decoded[:, 1::2, 0::2], unfolded[..., 6:9], atol=1e-5)
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert model.config.in_channels == model.config.out_channels == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.encode(np.zeros((1, 15, 16, 3), np.float32)), "B at least 1, H and W multiples of 2"),
        (
            lambda x: x.encode(np.zeros((1, 16, 16, 1), np.float32)),
            r"16, 1\]; expected floats \[B, H, W, 3\]",
        ),
        (lambda x: x.encode(np.zeros((16, 16, 3), np.float32)), r"float32\[16, 16, 3\]; expected"),
        (lambda x: x.encode(np.zeros((0, 16, 16, 3), np.float32)), "B at least 1"),
        (lambda x: x.encode(np.zeros((1, 16, 16, 3), np.uint8)), r"images are uint8\[1, 16, 16, 3\]; expected floats"),
        (lambda x: x.encode("cat.png"), "images are <U7.*; expected floats"),
        (lambda x: x.decode(np.zeros((1, 8, 8, 4), np.float32)), "latents are .*; expected"),
        (lambda x: Autoencoder(x.config, {}), "params lacks tensor decoder"),
        (lambda x: Autoencoder(x.config, None), "params is None"),
        (lambda x: Autoencoder("sd", x.params), "config is 'sd'"),
    ],
)
def test_errors_are_one_line(call, message, tiny):
    with pytest.raises(UserError, match=message) as error:
        call(tiny)
    assert "\n" not in str(error.value)
