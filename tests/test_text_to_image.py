"""Latents of images and captions on disk, flows that learn from them, and images from captions."""

import dataclasses
import functools
import importlib
import json
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import commands
from configs import emoji64_autoencoder, emoji64_text
from tarflow_jax import Guidance, TarFlowPipeline, data
from tarflow_jax.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderKL
from tarflow_jax.data import latents
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation import classifier
from tarflow_jax.evaluation.generation import Sampler
from tarflow_jax.noise import Noise
from tarflow_jax.sampling import Sequential
from tarflow_jax.text import WordVectors
from tarflow_jax.text_to_image import TextToImage
from tarflow_jax.training import Recipe, train, train_step
from tarflow_jax.training.step import initial_state
from tarflow_jax.training.task import FlowTask, Frozen
from test_captions import captioned, write_captioned  # noqa: F401 (a fixture)

SMALL = AutoencoderConfig(
    latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
    scaling_factor=2.0,
)  # fmt: skip
WORDS = ("cat", "dog", "a", "number", *map(str, range(40)))
TEXT = WordVectors(WORDS, np.random.default_rng(0).normal(size=(len(WORDS), 8)).astype(np.float16), length=3)


@pytest.fixture(scope="module")
def autoencoder():
    params = AutoencoderKL(SMALL).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    return Autoencoder(SMALL, params)


def packed(folder, captioned, autoencoder, **options):  # noqa: F811
    """Packs the latents of the captioned folder, 8 x 8 x 4, as launch.prepare_data does."""
    sources = {split: data.open_source(f"folder:{captioned}", split, data_dir=folder) for split in ("train", "test")}
    text = options.pop("text", TEXT)
    latents.pack_latents(folder / "latents", sources, autoencoder.posterior, text, "encoders", **options)
    autoencoder.save_pretrained(folder / "latents" / "autoencoder")
    if text:
        text.save(folder / "latents" / "text")
    return sources, f"latents:{folder / 'latents'}"


def test_packed_latents_are_those_of_the_images(captioned, autoencoder, tmp_path):  # noqa: F811
    sources, name = packed(tmp_path, captioned, autoencoder, copies=1)
    for split, source in sources.items():
        found, count = data.open_source(name, split), len(source)
        wordings = [texts if split == "train" else texts[:1] for texts in source.captions]
        number = sum(map(len, wordings))
        assert len(found) == number * (2 if split == "train" else 1)
        values, labels = found.read(range(number))
        images, all_labels = source.read(range(count))
        mean, std = autoencoder.posterior(images / np.float32(127.5) - 1)
        repeats = [len(texts) for texts in wordings]
        np.testing.assert_allclose(values.mean, np.repeat(mean, repeats, 0), atol=2e-3)
        np.testing.assert_allclose(values.std, np.repeat(std, repeats, 0), rtol=2e-3)
        np.testing.assert_array_equal(labels, np.repeat(all_labels, repeats))
        captions = [text for texts in wordings for text in texts]
        assert [texts[0] for texts in found.captions[:number]] == captions
        np.testing.assert_array_equal(values.condition, TEXT(captions))
        if split == "train":
            assert [texts[0] for texts in found.captions[number:]] == [f"moved, {text}" for text in captions]
    assert found.image_shape == (8, 8, 4)
    train_set = data.open_source(name, "train")
    copy = train_set.read([len(train_set) // 2])[0].mean
    assert 0.01 < np.abs(copy - train_set.read([0])[0].mean).mean() < 1
    with pytest.raises(UserError, match="holds other latents"):
        packed(tmp_path, captioned, autoencoder, copies=2)


@pytest.mark.slow
def test_packing_continues_where_it_stopped(captioned, autoencoder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(latents, "IMAGES_AT_A_TIME", 8)
    _, name = packed(tmp_path / "whole", captioned, autoencoder)
    calls = []

    class Interrupted(Autoencoder):
        def posterior(self, images):
            calls.append(len(images))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().posterior(images)

    failing = Interrupted(SMALL, autoencoder.params)
    with pytest.raises(KeyboardInterrupt):
        packed(tmp_path / "stopped", captioned, failing)
    with pytest.raises(FileNotFoundError, match="holds no prepared set"):
        data.open_source(f"latents:{tmp_path / 'stopped' / 'latents'}", "train")
    _, again = packed(tmp_path / "stopped", captioned, failing)
    whole, continued = (data.open_source(each, "train") for each in (name, again))
    assert len(calls) == 3 + -(-len(set(whole._rows[:, 0])) // 8) - 2 + 1  # the two first parts are not encoded again
    jax.tree.map(np.testing.assert_array_equal, *(each.read(range(len(whole)))[0] for each in (whole, continued)))


@pytest.mark.parametrize("damage", ["manifest", "rows", "mean"])
def test_damaged_latents_are_refused(captioned, autoencoder, tmp_path, damage):  # noqa: F811
    _, name = packed(tmp_path, captioned, autoencoder)
    folder = tmp_path / "latents"
    if damage == "manifest":
        (folder / "manifest.json").write_text('{"format": "tarflow_jax latents 1"}')
    elif damage == "rows":
        rows = np.load(folder / "train-rows.npy")
        np.save(folder / "train-rows.npy", rows + 1000)
    else:
        np.save(folder / "train-mean.npy", np.array([None, "code"], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"latents:.*damaged"):
        data.open_source(name, "train")


def small_recipe(name, **train_fields):
    config = emoji64_text.get_config("smoke")
    shape = {"image_channels": 4, "patch_size": 2, "width": 32, "head_dim": 16, "num_blocks": 2}
    config.model.update({**shape, "condition_length": 3, "condition_dim": 8, "num_classes": 2})
    config.noise.std = 0.25
    config.data.update({"source": name, "num_workers": 0})
    fields = {"num_steps": 4, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, "evaluate_every": 4}
    config.train.update({**fields, "sample_every": 0, **train_fields})
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory, autoencoder):
    """A workdir of a flow of latents, trained for four steps."""
    root = tmp_path_factory.mktemp("text_to_image")
    _, name = packed(root, write_captioned(root), autoencoder)
    config = small_recipe(name)
    train(config, root / "run")
    return root / "run"


def test_dropped_captions_are_the_empty_one_and_latents_get_both_noises():
    recipe = small_recipe("latents:unused")
    recipe.data.source = "digits"
    model = Recipe(recipe).model
    task = FlowTask(model, Noise("gaussian", 0.3), drop_label=0.5)
    zeros = jnp.zeros((4000, 8, 8, 4))
    batch = data.Latents(zeros + 1, zeros + 0.4, jnp.ones((4000, 3, 8)))
    noisy, conditioning, levels = task.prepare(jax.random.key(0), batch, jnp.ones(4000, jnp.int32))
    assert levels is None
    np.testing.assert_allclose([noisy.mean(), noisy.std()], [1, 0.5], atol=0.005)
    condition = conditioning.condition
    dropped = np.isnan(condition).all((1, 2))
    np.testing.assert_array_equal(dropped, conditioning.labels == -1)
    assert 0.45 < dropped.mean() < 0.55
    assert (condition[~dropped] == 1).all()


@pytest.mark.slow
def test_a_trained_flow_draws_from_captions(trained, tmp_path):
    pipe = TextToImage.from_pretrained(trained)
    images = pipe(["cat 2", "dog 3"], num_images=2)
    assert images.shape == (4, 16, 16, 3)
    latents_drawn = pipe.flow.sample(
        jax.random.key(0), 4, None, pipe.guidance, True, condition=np.repeat(TEXT(["cat 2", "dog 3"]), 2, 0),
        null_condition=TEXT([""])[0],
    )  # fmt: skip
    np.testing.assert_allclose(images, pipe.autoencoder.decode(latents_drawn), atol=1e-5)
    np.testing.assert_array_equal(pipe(TEXT(["cat 2", "dog 3"]), num_images=2), images)
    other = pipe(["dog 3"], num_images=4)
    assert np.abs(np.asarray(other[0] - images[0])).max() > 1e-4
    assert np.abs(np.asarray(pipe("cat 2", guidance=Guidance(), num_images=4)[0] - images[0])).max() > 1e-4
    pipe.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    assert 'TextToImage.from_pretrained("path' in card
    assert "| text encoder | 3 embeddings of 8 a caption |" in card
    again = TextToImage.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again(["cat 2", "dog 3"], num_images=2), images)
    assert again.guidance == pipe.guidance
    assert TarFlowPipeline.from_pretrained(tmp_path / "saved").config == pipe.flow.config
    weights = tmp_path / "saved" / "autoencoder" / "diffusion_pytorch_model.safetensors"
    size = weights.stat().st_size
    pipe.save_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert weights.stat().st_size < 0.6 * size
    rounded = TextToImage.from_pretrained(tmp_path / "saved")(["cat 2", "dog 3"], num_images=2)
    assert 0 < np.abs(rounded - images).max() < 0.2
    pipe.flow.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="is a flow alone"):
        TextToImage.from_pretrained(tmp_path / "saved")


@pytest.mark.slow
def test_parts_that_do_not_fit_are_refused(trained, autoencoder):
    pipe = TextToImage.from_pretrained(trained)
    with pytest.raises(UserError, match="prompts are None; this flow was trained with captions"):
        pipe(num_images=2)
    with pytest.raises(UserError, match=r"the text encoder makes 5 embeddings of 8"):
        TextToImage(pipe.flow, autoencoder, dataclasses.replace(TEXT, length=5))
    wider = dataclasses.replace(SMALL, latent_channels=8)
    params = AutoencoderKL(wider).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    with pytest.raises(UserError, match="the autoencoder's latents have 8 channels"):
        TextToImage(pipe.flow, Autoencoder(wider, params), TEXT)


@pytest.mark.slow
@pytest.mark.parametrize(("removed", "denoise"), [(0.25, False), (0.2, True)])
def test_latents_are_denoised_unless_the_decoder_removes_their_noise(trained, autoencoder, removed, denoise):
    pipe = TextToImage.from_pretrained(trained)
    assert pipe.flow.noise_std == 0.25
    robust = Autoencoder(dataclasses.replace(SMALL, noise_std=removed), autoencoder.params)
    images = TextToImage(pipe.flow, robust, TEXT)("cat 2", num_images=2, guidance=Guidance())
    expected, other = (pipe("cat 2", 2, Guidance(), denoise=value) for value in (denoise, not denoise))
    np.testing.assert_allclose(images, expected, atol=1e-5)
    assert np.abs(images - other).max() > 1e-3


@pytest.mark.slow
def test_samples_of_other_encoders_are_others(trained, autoencoder):
    flow = TextToImage.from_pretrained(trained).flow
    rescaled = Autoencoder(dataclasses.replace(SMALL, scaling_factor=1.0), autoencoder.params)
    other_text = dataclasses.replace(TEXT, table=-TEXT.table)
    models = [
        TextToImage(flow, *others) for others in ((autoencoder, TEXT), (rescaled, TEXT), (autoencoder, other_text))
    ]
    samplers = [Sampler(model, Guidance(), False, 1.0, Sequential(), ("a cat",)) for model in models]
    assert len({json.dumps(sampler.protocol()) for sampler in samplers}) == 3


@pytest.mark.slow
def test_by_command_from_images_to_a_captioned_grid(captioned, tmp_path):  # noqa: F811
    """Packs images, trains their autoencoder, packs latents, trains the flow, and draws."""
    smoke = "configs/emoji64_autoencoder.py:smoke"
    sizes = ["--config.autoencoder.block_out_channels=(8,)", "--config.autoencoder.latent_channels=4"]
    data_dir = ["--data_dir", tmp_path / "data"]
    code, out, err = commands.run(
        "-m", "launch.prepare_data", f"--data=folder:{captioned}", "--image_size=16", *data_dir
    )
    assert code == 0, err
    images = out.split("--config.data.source=")[1].split(";")[0]
    code, out, err = commands.run(
        "-m", "launch.train_autoencoder", f"--config={smoke}", f"--config.data.source={images}", *sizes,
        "--workdir", tmp_path / "autoencoder",
    )  # fmt: skip
    assert code == 0, err
    assert "PSNR of test images" in out
    folder = tmp_path / "autoencoder" / "autoencoder"
    assert Autoencoder.from_pretrained(folder).config.noise_std > 0
    code, out, err = commands.run(
        "-m", "launch.prepare_data", f"--data={images}", f"--autoencoder={folder}", "--text_encoder=words",
        "--text_length=3", f"--out={tmp_path / 'latents'}", *data_dir,
    )  # fmt: skip
    assert code == 0, err
    run = tmp_path / "run"
    shape = ["--config.model.image_channels=4", "--config.model.condition_length=3", "--config.model.width=64"]
    code, out, err = commands.run(
        "-m", "launch.train", "--config=configs/emoji64_text.py:smoke", *shape, f"--workdir={run}",
        f"--config.data.source=latents:{tmp_path / 'latents'}", "--config.train.num_steps=4",
    )  # fmt: skip
    assert code == 0, err
    assert (run / "figures" / "samples_guided.png").exists()
    code, out, err = commands.run(
        "-m", "launch.sample", f"--workdir={run}", "--prompt=a cat", "--prompt=dog 3", "--num_images=2"
    )
    assert code == 0, err
    assert np.load(run / "samples" / "samples.npz")["arr_0"].shape == (4, 16, 16, 3)
    code, out, err = commands.run("-m", "launch.sample", f"--workdir={run}")
    assert code == 1
    assert err.strip() == 'error: this flow draws from captions; give it one, --prompt="…"'
    code, out, err = commands.run("-m", "launch.sample", f"--workdir={tmp_path / 'autoencoder'}")
    assert code == 1
    assert "holds an autoencoder" in err


@pytest.mark.slow
def test_the_decoder_alone_is_trained(captioned, autoencoder, tmp_path):  # noqa: F811
    config = emoji64_autoencoder.get_config("smoke")
    config.autoencoder.update({**SMALL.to_dict(), "noise_std": 0.5})
    config.decoder_of = str(tmp_path)
    config.data.source = f"folder:{captioned}"
    config.data.data_dir = str(tmp_path / "data")
    config.train.update({"num_steps": 2, "batch_size": 8, "checkpoint_every": 2, "sample_every": 0})
    recipe = Recipe(config)
    params = jax.device_get(autoencoder.params)
    encoder = {"encoder": params["encoder"], "quant_conv": params["quant_conv"]}
    decoder = {name: leaves for name, leaves in params.items() if name not in encoder}
    state = train(config, tmp_path / "run", None, Frozen(encoder=encoder), {"params": {"autoencoder": decoder}})
    trained_params = state.variables["params"]["autoencoder"]
    assert trained_params.keys() == decoder.keys()
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), jax.device_get(trained_params), decoder)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1  # from where it began
    assert json.loads(recipe.to_json())["autoencoder"]["noise_std"] == 0.5


@pytest.mark.slow
def test_the_demo_draws_from_a_caption(trained):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = commands.start("-m", "launch.demo", f"--workdir={trained}", f"--port={port}", "--num_images=2")
    try:
        assert server.stdout.readline() == f"http://127.0.0.1:{port}\n", server.communicate()[1]
        import gradio_client

        client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
        images = client.predict("cat 2", -1, 1.0, 0, api_name="/draw")
        assert len(images) == 2
        assert all(each["image"].endswith(".png") for each in images)
    finally:
        server.terminate()
        _, errors = server.communicate(timeout=60)
    assert "Traceback" not in errors, errors


@pytest.mark.slow
def test_samples_are_compared_with_the_images_that_were_packed(trained, tmp_path, monkeypatch):
    evaluate = ("-m", "launch.evaluate", f"--workdir={trained}", f"--out={tmp_path}")
    images = data.open_source(Recipe.from_workdir(trained).config.data.source, "train").images_name
    monkeypatch.setattr(classifier, "MIN_STEPS", 20)  # the commands find what was trained here
    classifier.classifier_network(
        *(data.open_source(images, split) for split in ("train", "test")), tmp_path / "evaluation"
    )
    code, out, err = commands.run(*evaluate, "--metrics=bits_per_dim", "--allow_noisy", TARFLOW_DATA_DIR=str(tmp_path))
    assert code == 0, err
    assert "nats/dim of noisy latents" in out
    (tmp_path / "prompts.txt").write_text("cat 2\n\ndog 3\n")
    code, out, err = commands.run(
        *evaluate, "--metrics=precision_recall", "--num_samples=4", f"--prompts={tmp_path / 'prompts.txt'}",
        f"--save_samples={tmp_path / 'samples.npz'}", TARFLOW_DATA_DIR=str(tmp_path),
    )  # fmt: skip
    assert code == 0, err
    assert any("2 captions in turn" in file.read_text() for file in tmp_path.glob("*.json"))
    saved = np.load(tmp_path / "samples.npz")["arr_0"]
    assert saved.shape == (4, 16, 16, 3)
    code, out, err = commands.run(*evaluate, "--metrics=classification", TARFLOW_DATA_DIR=str(tmp_path))
    assert code == 1
    assert err.strip() == "error: classification is for a flow of images; this one is of latents"


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("emoji64_text", 1.739),
        pytest.param("starflow_t2i256", 3858.3, marks=pytest.mark.slow),
        pytest.param("starflow_imagenet256", 1422.5, marks=pytest.mark.slow),
    ],
)
def test_recipes_of_latents_make_a_full_step(name, millions):
    recipe = Recipe(importlib.import_module(f"configs.{name}").get_config())
    config, count = recipe.train_config, recipe.config.train.batch_size
    state = jax.eval_shape(functools.partial(initial_state, config), jax.random.key(0))
    values = jax.ShapeDtypeStruct((count, *recipe.model.image_shape), jnp.float32)
    condition = None
    if recipe.model.condition_dim:
        condition = jax.ShapeDtypeStruct((count, *recipe.model.condition_shape), jnp.float32)
    batch, labels = data.Latents(values, values, condition), jax.ShapeDtypeStruct((count,), jnp.int32)
    step = functools.partial(train_step, config)
    new_state, metrics = jax.eval_shape(step, state, batch, labels, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.variables["params"]))
    assert parameters / 1e6 == pytest.approx(millions, rel=1e-3)
