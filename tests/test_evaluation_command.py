"""launch.evaluate on an untrained model, in processes of their own."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from PIL import Image

import commands
from configs import digits
from tarflow_jax import data
from tarflow_jax.evaluation import scores
from tarflow_jax.evaluation.classifier import classifier_network
from tarflow_jax.flow import TarFlow, TarFlowConfig
from tarflow_jax.noise import Noise
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.training import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    config = TarFlowConfig((8, 8), 1, patch_size=4, width=64, num_blocks=2, layers_per_block=1, num_classes=10)
    variables = jax.jit(TarFlow(config).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    folder = tmp_path_factory.mktemp("model") / "model"
    TarFlowPipeline(config, {"params": variables["params"]}, Noise("gaussian", 0.1)).save_pretrained(folder)
    return folder


def evaluate(folder: Path, *arguments: str) -> tuple[int, str, str]:
    devices = f"{commands.NOT_OPTIMISED} --xla_force_host_platform_device_count=2"
    return commands.run(
        "-m", "launch.evaluate", *arguments, cwd=folder, TARFLOW_DATA_DIR=str(folder / "data"), XLA_FLAGS=devices
    )


def log_prob(noisy: jax.Array) -> np.ndarray:
    """Of an untrained model: it is the identity, whatever the label."""
    return scipy.stats.norm.logpdf(np.asarray(noisy, np.float64)).sum((1, 2, 3))


def sample_metrics(images: np.ndarray, folder: Path) -> dict[str, float]:
    """Of samples against the training images, by the features of the judge."""
    train, test = (data.open_source("digits", split, data_dir=folder) for split in ("train", "test"))
    network = classifier_network(train, test, folder / "evaluation")
    generated, real = (
        np.asarray(network(x).pooled, np.float64) for x in (images, train.read(np.arange(len(train)))[0])
    )
    shift = generated.mean(0) - real.mean(0)
    covariances = [np.cov(features, rowvar=False) for features in (generated, real)]
    roots = scipy.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)
    distance = shift @ shift + sum(map(np.trace, covariances)) - 2 * np.sqrt(roots).sum()
    precision, recall = scores.precision_recall(generated, real)
    return {
        "Fréchet distance (classifier features)": distance,
        "precision (classifier features)": precision,
        "recall (classifier features)": recall,
    }


def test_tables_and_file_state_the_protocol(model, tmp_path):
    code, out, err = evaluate(
        tmp_path,
        f"--model={model}",
        "--data=digits",
        "--metrics=bits_per_dim,classification,outliers,fid,precision_recall",
        "--allow_noisy",
        "--outliers=digits",
        "--num_samples=200",
        "--classification_draws=2",
        "--denoise=false,true",
        "--save_samples=samples.npz",
    )
    assert code == 0, err
    (path,) = (tmp_path / "evaluation").glob("*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert {
        "fingerprint",
        "seed",
        "split",
        "preprocessing",
        "network",
        "reference",
        "num_samples",
    } <= content["protocol"].keys()
    results = content["results"]
    test = data.open_source("digits", "test", data_dir=tmp_path / "data")
    images, labels = test.read(np.arange(len(test)))
    key, noise = jax.random.key(0), Noise("gaussian", 0.1)
    noisy = jnp.stack([noise(jax.random.fold_in(key, i), jnp.asarray(x)) for i, x in enumerate(images)])
    nats = -log_prob(noisy) / 64
    assert results["bits_per_dim"]["nats/dim of noisy data"] == pytest.approx(nats.mean(), rel=1e-6)
    assert results["bits_per_dim"]["standard error"] == pytest.approx(scipy.stats.sem(nats), rel=1e-4)
    assert results["classification"]["accuracy"] == (labels == 0).mean()  # of equals the first is taken
    assert results["classification"]["draws"] == 2
    inside, outside = (log_prob(noise(key, jnp.asarray(images))) for key in jax.random.split(key))
    auroc = (inside[:, None] > outside).mean()
    assert results["outliers"]["auroc"] == pytest.approx(auroc, abs=1e-4)  # float32 has ties
    settings = [(row["guidance"], row["denoised"], row["not finite"]) for row in results["samples"]]
    assert settings == [(0, False, 0), (0, True, 0)]
    assert "|   guidance | denoised   |" in out
    judge = json.loads((commands.ROOT / "models/judges/digits/judge.json").read_text())
    named = f"classifier, judge digits, sha256 {judge['sha256']} (test accuracy {judge['accuracy']:.4f}; "
    assert content["protocol"]["network"].startswith(named)
    assert f"network: {named}" in out
    images, labels = np.load(tmp_path / "samples.npz").values()
    assert images.shape == (200, 8, 8, 3)
    assert content["protocol"]["labels"] == "as often as in the reference split"
    real = data.open_source("digits", "train", data_dir=tmp_path / "data").labels
    assert abs(np.bincount(labels) - np.bincount(real) * 200 / 1500).max() < 1
    # These are of the last setting.
    expected = sample_metrics(images[..., :1], tmp_path / "data")
    assert {name: results["samples"][1][name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_bits_per_dim_of_a_gaussian_model_is_refused_in_one_line(model, tmp_path):
    code, _, err = evaluate(tmp_path, f"--model={model}", "--data=digits", "--metrics=bits_per_dim")
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "--allow_noisy for nats/dim" in line
    assert "Traceback" not in err
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["launch.evaluate", "--data=digits", "--metrics=bits_per_dim,outliers", "--outliers=digits", "--allow_noisy"],
        ["launch.sample", "--num_images=2"],
    ],
    ids=["evaluate", "sample"],
)
def test_the_memory_bound_reaches_every_batch(model, tmp_path, command):
    program = (
        "import runpy, sys\n"
        "from tarflow_jax.runtime import BatchRunner\n"
        "run = BatchRunner.run\n"
        "def printing(self, *args, **options):\n"
        "    print('memory bound', self.memory_bound)\n"
        "    return run(self, *args, **options)\n"
        "BatchRunner.run = printing\n"
        "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n"
    )
    folder = ("--memory_bound=0.25", f"--model={model}", f"--out={tmp_path}")
    code, out, err = commands.run("-c", program, *command, *folder)
    assert code == 0, err
    bounds = {line for line in out.splitlines() if line.startswith("memory bound")}
    assert bounds == {f"memory bound {2**28}"}


def test_a_run_is_evaluated_on_its_data_as_it_was_trained_on_them(tmp_path):
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        for kind in ("inside", "outside"):
            (tmp_path / kind / name).mkdir(parents=True)
            for i in range(20):
                pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / kind / name / f"{i}.png")
    (tmp_path / "inside" / "cats" / "damaged.png").write_bytes(b"no image")
    fields = {
        "data.source": f"folder:{tmp_path / 'inside'}", "data.data_dir": tmp_path / "data", "data.skip_bad": True,
        "model.image_channels": 3, "model.num_classes": 2, "train.num_steps": 1, "train.sample_every": 0,
        "model.width": 16, "model.head_dim": 16, "model.num_blocks": 1,
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    elsewhere, workdir = str(tmp_path / "elsewhere"), f"--workdir={tmp_path / 'run'}"
    code, _, err = commands.run(
        "-m", "launch.train", "--config=configs/digits.py:smoke", workdir, *overrides, TARFLOW_DATA_DIR=elsewhere
    )
    assert code == 0, err
    checked = len(list((tmp_path / "data" / "checked").iterdir()))
    outliers = f"--outliers=folder:{tmp_path / 'outside'}"
    code, _, err = commands.run(
        "-m", "launch.evaluate", workdir, "--metrics=outliers", outliers, TARFLOW_DATA_DIR=elsewhere
    )
    assert code == 0, err
    assert len(list((tmp_path / "data" / "checked").iterdir())) == checked + 1
    assert not (tmp_path / "elsewhere").exists()


def test_a_model_of_16_bits_is_measured_in_bits_of_16(tmp_path):
    images = np.random.default_rng(0).integers(0, 65536, (300, 8, 8, 1), np.uint16)
    np.savez(tmp_path / "deep.npz", images=images)
    config = TarFlowConfig((8, 8), 1, patch_size=4, width=64, num_blocks=1, layers_per_block=1, image_bits=16)
    params = jax.jit(TarFlow(config).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    TarFlowPipeline(config, {"params": params}, Noise("uniform")).save_pretrained(tmp_path / "model")
    command, deep = (tmp_path, f"--model={tmp_path}/model"), f"--data=npz:{tmp_path}/deep.npz"
    code, _, err = evaluate(*command, deep, f"--out={tmp_path}/out")
    assert code == 0, err
    (found,) = (tmp_path / "out").glob("*.json")
    test = data.open_source(f"npz:{tmp_path}/deep.npz", "test").images
    expected = -log_prob(2 * ((test + 0.5) / 65536) - 1).mean() / 64 / np.log(2) + 15
    result = json.loads(found.read_text())["results"]["bits_per_dim"]
    assert (result["bits/dim"], result["levels"]) == (pytest.approx(expected, abs=1e-3), 65536)
    for more, message in (
        (
            (deep, "--metrics=fid", "--num_samples=2100"),
            "fid is of 8-bit images; choose bits_per_dim,",
        ),
        (("--data=digits",), "digits has images of 8 bits, the model 16"),
    ):
        code, _, err = evaluate(*command, *more, f"--out={tmp_path}/other")
        assert code == 1
        assert message in err


def test_changed_data_are_refused_and_a_result_on_them_replaces_none(tmp_path):
    random, path, workdir = np.random.default_rng(0), tmp_path / "d.npz", tmp_path / "run"
    images, labels = random.integers(0, 256, (60, 8, 8, 1), np.uint8), np.arange(60) % 10
    np.savez(path, images=images, labels=labels)
    config = digits.get_config("smoke")
    config.data.source = f"npz:{path}"
    config.model.update({"num_blocks": 1, "layers_per_block": 1, "width": 16, "head_dim": 16})
    config.train.update({"num_steps": 1, "sample_every": 0})
    train(config, workdir)

    def evaluate_run(*more: str) -> tuple[int, str]:
        code, _, err = evaluate(tmp_path, f"--workdir={workdir}", "--metrics=bits_per_dim", "--allow_noisy", *more)
        return code, [line for line in err.splitlines() if line.startswith(("error: ", "warning: "))]

    assert evaluate_run() == (0, [])
    (first,) = (workdir / "evaluation").iterdir()
    before = first.read_bytes()
    np.savez(path, images=images[::-1], labels=labels)
    changed = f"npz:{path} is not what {workdir} was trained on"
    code, (line,) = evaluate_run()
    assert (code, first.read_bytes()) == (1, before)
    assert line.startswith(f"error: {changed}: images, labels or their order have changed since; bring them back, or")
    assert evaluate_run(f"--data=npz:{path}") == (0, [f"warning: {changed}"])
    assert evaluate_run(f"--data=npz:{path}", "--dequantisation_draws=2") == (0, [f"warning: {changed}"])
    assert len(list((workdir / "evaluation").iterdir())) == 3
    assert first.read_bytes() == before
    assert (
        "is not what"
        in commands.run("-m", "launch.distill", f"--workdir={workdir}", "--config=configs/student/digits.py:smoke")[2]
    )
