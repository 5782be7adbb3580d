"""A workdir in an object store, gs://, which a folder plays here."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from configs import digits
from tarflow_jax import figures
from tarflow_jax.evaluation import generation
from tarflow_jax.files import replacing
from tarflow_jax.sampling import Schedule, Sequential
from tarflow_jax.training import Recipe, metrics
from tarflow_jax.training.workdir import write_results, write_start


@pytest.fixture
def bucket(tmp_path):
    """gs://bucket, played by a folder that, as the real one, does not append."""

    def local(path):
        return os.fspath(path).replace("gs://", f"{tmp_path}/", 1)

    def open_(original, path, mode):
        assert "a" not in mode, "an object store does not append"
        Path(local(path)).parent.mkdir(parents=True, exist_ok=True)
        return original(local(path), mode)

    def two(original, path, target):
        return original(local(path), local(target))

    def one(original, path, **options):
        return original(local(path), **options)

    names = ("exists", "isdir", "listdir", "makedirs", "mkdir", "remove", "stat")
    with epath.testing.mock_epath(open=open_, rename=two, replace=two, **dict.fromkeys(names, one)):
        yield epath.Path("gs://bucket/run")


def test_all_of_a_workdir_but_orbax_s_part_goes_through_epath(bucket, monkeypatch, tmp_path):
    folders = []
    monkeypatch.setattr(metrics, "SummaryWriter", lambda folder, **options: folders.append(folder) or Quiet())
    recipe = Recipe(digits.get_config())
    recipe.write_to(bucket)
    assert Recipe.from_workdir(bucket).to_json() == recipe.to_json()
    write_results(bucket, {"loss": 1.0})
    for start in (0, 2):
        write_start(bucket, start)
        writer = metrics.MetricsWriter(bucket, start)
        for step in range(start + 1, start + 4):
            writer.write(step, {"loss": float(start)})
        writer.close()
    found = [json.loads(line) for line in (bucket / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in found] == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]
    starts = [json.loads(line) for line in (bucket / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 2]
    assert folders == ["gs://bucket/run/tensorboard"] * 2
    figures.save_gif(bucket / "figures" / "way.gif", [np.zeros((4, 4, 1), np.uint8)] * 2)
    chunks = generation.chunk_folder(bucket / "evaluation", {"seed": 0})
    generation.generate(lambda key, number, labels: jax.numpy.zeros((number, 2, 2, 1)), chunks, 4, 4, (), seed=0)
    assert len(generation.read_chunks(chunks, 4, 4, ()).images) == 4
    Schedule({1: (Sequential(),)}, "0123").write(bucket)
    assert Schedule.read(bucket, 1).decoders == {1: (Sequential(),)}
    written = {str(path.relative_to(tmp_path / "bucket" / "run").parts[0]) for path in tmp_path.rglob("*.*")}
    assert written == {
        "config.json",
        "results.json",
        "starts.jsonl",
        "metrics.jsonl",
        "figures",
        "evaluation",
        "decoder.json",
    }


def test_an_object_is_written_when_all_of_it_is_there(bucket):
    def half():
        with replacing(bucket / "a.json") as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert not (bucket / "a.json").exists()


class Quiet:
    """A TensorBoard writer that writes nothing."""

    def add_scalar(self, tag, value, step):
        pass

    def close(self):
        pass
