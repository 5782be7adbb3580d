"""launch.evaluate on an untrained model, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax.evaluation.sample_files import read_samples
from tarflow_jax.flow import TarFlow, TarFlowConfig
from tarflow_jax.noise import Noise
from tarflow_jax.pipeline import TarFlowPipeline

COMMAND = Path(__file__).with_name("quick_evaluate.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    config = TarFlowConfig((8, 8), 1, patch_size=4, width=64, num_blocks=2, layers_per_block=1, num_classes=10)
    images, labels = jnp.zeros((1, 8, 8, 1)), jnp.zeros((1,), jnp.int32)
    variables = jax.jit(TarFlow(config).init)(jax.random.key(0), images, labels)
    folder = tmp_path_factory.mktemp("model") / "model"
    TarFlowPipeline(config, {"params": variables["params"]}, Noise("gaussian", 0.1)).save_pretrained(folder)
    return folder


def evaluate(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "TARFLOW_DATA_DIR": str(folder / "data"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, str(COMMAND), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_tables_and_file_state_the_protocol(model, tmp_path):
    finished = evaluate(
        tmp_path,
        f"--model={model}",
        "--data=digits",
        "--metrics=bits_per_dim,classification,outliers,fid,precision_recall",
        "--allow_noisy",
        "--outliers=digits",
        "--num_samples=200",
        "--denoise=false,true",
        "--save_samples=samples.npz",
    )
    assert finished.returncode == 0, finished.stderr
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
    assert "nats/dim of noisy data" in results["bits_per_dim"]
    assert results["outliers"]["auroc"] == pytest.approx(0.5, abs=0.1)
    assert 0 <= results["classification"]["accuracy"] <= 1
    settings = [(row["guidance"], row["denoised"], row["not finite"]) for row in results["samples"]]
    assert settings == [(0, False, 0), (0, True, 0)]
    for row in results["samples"]:
        assert np.isfinite(row["Fréchet distance (classifier features)"])
        assert row["Fréchet distance (classifier features)"] > 0
    assert "| guidance | denoised |" in finished.stdout
    assert "test accuracy" in finished.stdout
    images, labels = read_samples(tmp_path / "samples.npz")
    assert images.shape == (200, 8, 8, 3)
    np.testing.assert_array_equal(labels[:12], [*range(10), 0, 1])


def test_bits_per_dim_of_a_gaussian_model_is_refused_in_one_line(model, tmp_path):
    finished = evaluate(tmp_path, f"--model={model}", "--data=digits", "--metrics=bits_per_dim")
    assert finished.returncode == 1
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert "--allow_noisy for nats/dim" in line
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "evaluation").exists()
