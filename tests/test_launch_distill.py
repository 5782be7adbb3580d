"""launch.distill, as a user runs it."""

import json

import numpy as np
import pytest
from PIL import Image

import commands
from configs import digits
from tarflow_jax import TarFlowPipeline
from tarflow_jax.training import train


def run(tmp_path, *arguments):
    flags = "--xla_backend_optimization_level=1"  # it trains a network of convolutions
    code, out, err = commands.run("-m", *arguments, TARFLOW_DATA_DIR=str(tmp_path / "data"), XLA_FLAGS=flags)
    assert code == 0, err
    return out


@pytest.mark.slow
def test_a_student_is_trained_beside_its_flow_and_drawn_with(tmp_path):
    workdir = tmp_path / "digits"
    train(digits.get_config("smoke"), workdir)
    command = ("launch.distill", f"--workdir={workdir}", "--config=configs/student/digits.py:smoke")
    out = run(tmp_path, *command, "--config.student.perceptual=1.0", "--config.train.log_every=10")
    assert "times the flow's" in out
    (network,) = (tmp_path / "data" / "evaluation").iterdir()  # named by the fingerprint of the data
    assert network.match("perception-digits-????????????????.safetensors")
    lines = [json.loads(line) for line in (workdir / "student" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert all(0 < line["perceptual"] < 4 for line in lines)

    with Image.open(workdir / "student" / "figures" / "step_0000020.png") as sheet:
        assert len(np.unique(np.asarray(sheet))) > 20
    run(tmp_path, "launch.sample", f"--workdir={workdir}", f"--out={tmp_path}", "--num_images=2", "--decoder=student")
    student = TarFlowPipeline.from_pretrained(workdir).student
    assert student.config.perceptual == 1.0
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as samples:
        assert samples["arr_0"].shape == (2, 8, 8, 3)
