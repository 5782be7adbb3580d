"""The recipe: what a workdir keeps of it, what may change there, and what cannot be."""

import json

import numpy as np
import pytest

from configs import digits
from tarflow_jax import Noise
from tarflow_jax.data import ArraySource
from tarflow_jax.training import Recipe


def test_schedule_and_workdir(tmp_path):
    config = digits.get_config()
    recipe = Recipe(config)
    schedule = recipe.train_config.optimizer.schedule()
    assert float(schedule(0)) == pytest.approx(1e-6, rel=1e-4)
    assert float(schedule(config.optimizer.warmup_steps)) == pytest.approx(config.optimizer.learning_rate)
    assert float(schedule(config.train.num_steps)) == pytest.approx(1e-6, rel=1e-4)
    recipe.write_to(tmp_path)
    free = {"train.log_every": 7, "data.data_dir": "/elsewhere", "data.num_workers": 3, "data.cache_bytes": 5}
    free |= {"data.skip_bad": True, "sample.guidance.weight": 3.0, "sample.denoise_multiplier": 0.5}
    config.update_from_flattened_dict(free)
    Recipe(config).write_to(tmp_path)
    config.noise.std = 0.2
    with pytest.raises(ValueError, match=r"another configuration: noise.std \(0.1 there, 0.2 here\)"):
        Recipe(config).write_to(tmp_path)
    assert Recipe.from_workdir(tmp_path).noise == Noise("gaussian", 0.1)
    with pytest.raises(FileNotFoundError, match="expected the workdir"):
        Recipe.from_workdir(tmp_path / "none")


def test_a_run_that_is_older_than_an_option_goes_on_with_its_default(tmp_path):
    config = digits.get_config()
    recipe = Recipe(config)
    recipe.write_to(tmp_path)
    older = json.loads(recipe.to_json())
    for group, name in (("model", "sequence_shape"), ("model", "start_token"), ("train", "block_penalty")):
        del older[group][name]
    (tmp_path / "config.json").write_text(json.dumps(older))
    recipe.write_to(tmp_path)
    config.model.start_token = True
    with pytest.raises(
        ValueError, match=r"another configuration: model.start_token \(False there, True here\); choose"
    ):
        Recipe(config).write_to(tmp_path)


def test_a_run_goes_on_with_the_data_it_began_with(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    labels = np.array([0, 1, 2, 1, 0])
    begun, same, moved, fewer = (
        ArraySource(name, *arrays, num_classes=3)
        for name, arrays in {
            "npz:here": (images, labels),
            "npz:there": (images.copy(), labels.copy()),
            "npz:shifted": (images, (labels + 1) % 3),
            "npz:fewer": (images[:4], labels[:4]),
        }.items()
    )
    recipe = Recipe(digits.get_config())
    recipe.write_to(tmp_path, begun)
    recipe.write_to(tmp_path, same)
    for changed in (moved, fewer):
        with pytest.raises(ValueError, match=r"digits is not what .* was trained on: images, labels or their order"):
            recipe.write_to(tmp_path, changed)


def test_a_model_is_trained_on_images_of_its_bits(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((60, 8, 8), np.uint16), labels=np.arange(60) % 10)
    config = digits.get_config()
    config.data.source = f"npz:{tmp_path}/set.npz"
    with pytest.raises(ValueError, match=r"set.npz has images of 16 bits, the model 8; set model.image_bits to 16"):
        Recipe(config).source("train")
    config.model.image_bits = 16
    assert Recipe(config).source("train").bits == 16


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.batch_size", 0, "batch_size is 0"),
        ("train.accumulation", 3, "not divisible by train.accumulation"),
        ("train.drop_label", 1.5, "drop_label is 1.5; expected a number from 0 to 1"),
        ("optimizer.ema_decay", 1.0, "ema_decay is 1.0"),
        ("optimizer.beta1", 2.0, "beta1 is 2.0"),
        ("optimizer.clip_norm", -1.0, "clip_norm is -1.0"),
        ("optimizer.warmup_steps", -1, "warmup_steps is -1"),
        ("optimizer.learning_rate", float("nan"), "learning_rate is nan"),
        ("model.patch_size", 3, "not divisible by patch_size 3"),
        ("train.profile_steps", (1, -1), r"profile_steps is \(1, -1\); expected a number from 0"),
        ("sample.guidance.rule", "best", "guidance.rule is 'best'"),
        ("sample.denoise_multiplier", float("inf"), "denoise_multiplier is inf; expected a finite number"),
        ("noise.kind", "none", "noise.kind is 'none'"),
    ],
)
def test_recipes_refuse_what_cannot_be(field, value, message):
    config = digits.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        Recipe(config)


def test_a_recipe_s_penalty_of_blocks_is_its_task_s():
    config = digits.get_config()
    config.train.block_penalty = 1e-4
    assert Recipe(config).task.block_penalty == 1e-4


def test_unknown_options_are_refused():
    config = digits.get_config()
    with config.unlocked():
        config.data.sorce = "digits"
    with pytest.raises(ValueError, match="unknown data field 'sorce'; did you mean 'source'"):
        Recipe(config)
