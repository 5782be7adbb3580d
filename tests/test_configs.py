"""Every recipe makes a full train step, by shapes alone."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from tarflow_jax import TarFlow
from tarflow_jax.training import Recipe, make_train_step
from tarflow_jax.training.state import initial_state

RECIPES = (
    "digits", "digits:likelihood", "digits:smoke", "fashion_mnist", "fashion_mnist:likelihood", "fashion_mnist:smoke",
    "imagenet64_likelihood", "imagenet64_uncond", "imagenet64_cond", "imagenet128_cond", "afhq256_cond", "emoji64",
)  # fmt: skip
PAPER_PARAMETERS = {"imagenet64_uncond": 463e6, "imagenet64_cond": 824e6, "afhq256_cond": 463e6}


@pytest.mark.parametrize("name", RECIPES)
def test_a_full_train_step_has_the_right_shapes(name):
    module, _, variant = name.partition(":")
    get_config = importlib.import_module(f"configs.{module}").get_config
    recipe = Recipe(get_config(variant) if variant else get_config())
    fields, flow, optimizer = recipe.config.train, TarFlow(recipe.model), recipe.optimizer()
    state = jax.eval_shape(lambda key: initial_state(flow, optimizer, key, ema=False), jax.random.key(0))
    step = make_train_step(
        flow, optimizer, recipe.noise, drop_label=fields.drop_label, accumulation=fields.accumulation
    )
    images = jax.ShapeDtypeStruct((fields.batch_size, *recipe.model.image_shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((fields.batch_size,), jnp.int32)
    new_state, metrics = jax.eval_shape(step, state, images, labels, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
    assert metrics["block_norms"].shape == (recipe.model.num_blocks,)
    if module in PAPER_PARAMETERS:
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.variables["params"]))
        assert parameters == pytest.approx(PAPER_PARAMETERS[module], rel=0.02)


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="unknown variant 'huge'; expected likelihood, smoke"):
        importlib.import_module("configs.digits").get_config("huge")
