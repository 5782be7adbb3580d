import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax import Guidance, Noise, TarFlowPipeline
from tarflow_jax.evaluation import generation
from tarflow_jax.evaluation.generation import Sampler
from tarflow_jax.sampling import Jacobi, Sequential
from tiny_models import TINY, random_variables

EQUAL = np.array([5, 5])
draw_samples = functools.partial(generation.draw_samples, chunk_size=4)
read_chunks = functools.partial(generation.read_chunks, chunk_size=4)


class Model:
    """Draws noise whose brightness follows the label, and remembers which chunks it was asked for."""

    def __init__(self, fail_at=None, nan_at=None, name="model"):
        self.calls, self.fail_at, self.nan_at, self.name = 0, fail_at, nan_at, name

    def protocol(self):
        return {"name": self.name}

    def __call__(self, key, number, labels):
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        images = 0.1 * jax.random.normal(key, (number, 2, 2, 1)) + labels.astype(jnp.float32).reshape(-1, 1, 1, 1)
        if self.calls == self.nan_at:
            images = images.at[1, 0, 0, 0].set(jnp.nan)
        self.calls += 1
        return images


def test_drawing_continues_after_a_kill(tmp_path):
    expected = read_chunks(draw_samples(Model(), tmp_path / "whole", 10, EQUAL, seed=3), 10, EQUAL)
    assert expected.images.shape == (10, 2, 2, 1)
    assert expected.num_not_finite == 0
    np.testing.assert_array_equal(expected.labels, np.arange(10) % 2)

    with pytest.raises(KeyboardInterrupt):
        draw_samples(Model(fail_at=2), tmp_path / "killed", 10, EQUAL, seed=3)
    (folder,) = (tmp_path / "killed").iterdir()
    with pytest.raises(FileNotFoundError, match="chunk_00002"):
        read_chunks(folder, 10, EQUAL)
    again = Model()
    assert draw_samples(again, tmp_path / "killed", 10, EQUAL, seed=3) == folder
    assert again.calls == 1
    np.testing.assert_array_equal(read_chunks(folder, 10, EQUAL).images, expected.images)


def test_first_samples_do_not_depend_on_the_number(tmp_path):
    folder = draw_samples(Model(), tmp_path, 12, EQUAL, seed=0)
    np.testing.assert_array_equal(read_chunks(folder, 5, EQUAL).images, read_chunks(folder, 12, EQUAL).images[:5])


def test_labels_are_as_frequent_as_they_should_be_at_any_time():
    np.testing.assert_array_equal(generation.labels_in_proportion(np.array([7, 7, 7]), 7), [0, 1, 2, 0, 1, 2, 0])
    counts = np.array([0, 2054, 3, 149, 240])
    labels = generation.labels_in_proportion(counts, counts.sum())
    np.testing.assert_array_equal(np.bincount(labels, minlength=5), counts)
    drawn = np.cumsum(np.eye(5)[labels], axis=0)
    due = np.arange(1, len(labels) + 1)[:, None] * counts / counts.sum()
    assert abs(drawn - due).max() < 1.5
    assert generation.labels_in_proportion((), 3) is None


def test_processes_share_the_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(generation.multihost_utils, "sync_global_devices", lambda name: None)
    for process, count in ((1, 1), (0, 2)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        model = Model()
        folder = draw_samples(model, tmp_path, 12, EQUAL, seed=0)
        assert model.calls == count
    assert len(read_chunks(folder, 12, EQUAL).images) == 12


def test_samples_that_are_not_finite_are_counted_and_kept(tmp_path):
    model = Model(nan_at=1)
    samples = read_chunks(draw_samples(model, tmp_path, 8, EQUAL, seed=0), 8, EQUAL)
    assert model.calls == 2
    assert samples.num_not_finite == 1
    assert samples.images[5, 0, 0, 0] == generation.NOT_FINITE


def test_a_protocol_has_its_own_folder(tmp_path):
    first = draw_samples(Model(), tmp_path, 4, EQUAL, seed=0)
    assert draw_samples(Model(), tmp_path, 8, EQUAL, seed=0) == first
    assert json.loads((first / "protocol.json").read_text())["class_counts"] == [5, 5]
    others = [
        draw_samples(Model(name="other"), tmp_path, 4, EQUAL, seed=0),
        draw_samples(Model(), tmp_path, 4, EQUAL, seed=1),
        draw_samples(Model(), tmp_path, 4, [5, 1], seed=0),
    ]
    assert len({first, *others}) == 4


def test_models_of_equal_weights_that_differ_otherwise_share_no_samples():
    gaussian, variables = Noise("gaussian", 0.1), random_variables(TINY)
    sampler = Sampler(TarFlowPipeline(TINY, variables, gaussian), Guidance(1.0), True, 1.0, Sequential())
    limited = dataclasses.replace(TINY, input_limit=3.0)
    others = [
        {"model": TarFlowPipeline(TINY, variables, Noise("gaussian", 0.2))},
        {"model": TarFlowPipeline(limited, variables, gaussian)},
        {"guidance": Guidance(2.0)},
        {"denoise": False},
        {"denoise_multiplier": 0.5},
        {"decoder": Jacobi()},
    ]
    protocols = [dataclasses.replace(sampler, **other).protocol() for other in ({}, {}, *others)]
    assert protocols[0] == protocols[1]
    assert len(set(map(json.dumps, protocols))) == 1 + len(others)


def test_eight_bit_values_are_the_nearest():
    images, not_finite = generation.quantise(np.array([-2, -1, -0.999, 0, 1, 3], np.float32).reshape(1, 1, 6, 1))
    np.testing.assert_array_equal(images.ravel(), [0, 0, 0, 128, 255, 255])
    assert not not_finite.any()


def test_a_damaged_chunk_is_refused(tmp_path):
    generation.write_npz(tmp_path / "chunk_00000.npz", images=np.zeros((3, 2, 2, 1), np.uint8))
    with pytest.raises(ValueError, match="delete it and run again"):
        read_chunks(tmp_path, 4, ())
