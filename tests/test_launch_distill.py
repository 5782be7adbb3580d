"""launch.distill, as a user runs it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import commands
from configs import digits
from tarflow_jax import TarFlowPipeline
from tarflow_jax.data import open_source
from tarflow_jax.evaluation import classifier
from tarflow_jax.training import train


def run(tmp_path, *arguments):
    return commands.run("-m", *arguments, TARFLOW_DATA_DIR=str(tmp_path / "data"))


@pytest.mark.slow
def test_a_student_is_trained_beside_its_flow_and_drawn_with(tmp_path):
    workdir = tmp_path / "digits"
    train(digits.get_config("smoke"), workdir)
    cached = tmp_path / "data" / "evaluation"  # where the command finds a perceptual network
    classifier.perceptual_network_params(open_source("digits", "train"), cached, max_steps=25)
    command = ("launch.distill", f"--workdir={workdir}", "--config=configs/student/digits.py:smoke")
    code, out, err = run(tmp_path, *command, "--config.student.perceptual=1.0", "--config.train.log_every=10")
    assert code == 0, err
    assert "times the flow's" in out
    (network,) = cached.iterdir()  # named by the fingerprint of the data
    assert network.match("perception-10-????????????????.safetensors")
    lines = [json.loads(line) for line in (workdir / "student" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert all(0 < line["perceptual"] < 4 for line in lines)

    with Image.open(workdir / "student" / "figures" / "step_0000020.png") as sheet:
        assert len(np.unique(np.asarray(sheet))) > 20
    sample = ("launch.sample", f"--workdir={workdir}", f"--out={tmp_path}", "--num_images=2", "--decoder=student")
    code, _, err = run(tmp_path, *sample)
    assert code == 0, err
    student = TarFlowPipeline.from_pretrained(workdir).student
    assert student.config.perceptual == 1.0
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as samples:
        assert samples["arr_0"].shape == (2, 8, 8, 3)

    shutil.rmtree(workdir / "checkpoints")
    (workdir / "config.json").unlink()
    config = digits.get_config("smoke")
    config.train.update({"seed": 1, "num_steps": 1})
    train(config, workdir)
    code, _, err = run(tmp_path, *command, "--config.student.perceptual=1.0")
    assert code == 1
    assert f"{workdir / 'student'} holds a student of other weights of the flow; remove it to train another" in err
