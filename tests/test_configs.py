"""Every recipe makes a full train step, by shapes alone."""

import functools
import importlib

import jax
import jax.numpy as jnp
import pytest

from tarflow_jax.training import Recipe, train_step
from tarflow_jax.training.step import initial_state

QUICK = ("digits:smoke",)
OTHERS = (
    "fashion_mnist:likelihood", "imagenet64_cond",
    "digits", "digits:likelihood", "fashion_mnist", "fashion_mnist:smoke", "imagenet64_likelihood",
    "imagenet64_uncond", "imagenet128_cond", "afhq256_cond", "emoji64", "imagenet64_levels", "imagenet128_levels",
    "imagenet256_levels", "emoji64_levels", "fashion_mnist_levels", "fashion_mnist_levels:smoke",
    "imagenet64_cond:tuned", "imagenet64_cond_patch2", "afhq256_cond:tuned",
)  # fmt: skip
RECIPES = (*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS))
TUNED_FIELDS = ("position_init", "rotary", "input_limit", "image_limit", "triangular")
PAPER_PARAMETERS = {"imagenet64_uncond": 463e6, "imagenet64_cond": 824e6, "afhq256_cond": 463e6}


def expected_parameters(model):
    """By hand, for an NVP flow: kernels and biases of width C, embeddings, tokens of D numbers in and 2 D out."""
    width, token = model.width, model.token_dim
    layer = 2 * 2 * width + (12 * width**2 + 9 * width)  # two norms; qkv, out, and the MLP's two products
    ends = (token + 1) * width + (width + 1) * 2 * token
    if model.triangular:
        ends += (width + 1) * token * (token - 1) // 2
    if model.noise_conditional:
        ends += (width + 1) * 4 * width + (4 * width + 1) * width
    block = ends + (model.num_tokens + model.num_classes) * width
    return model.num_blocks * block + sum(model.depths) * layer


@pytest.mark.parametrize("name", RECIPES)
def test_a_full_train_step_has_the_right_shapes(name):
    module, _, variant = name.partition(":")
    get_config = importlib.import_module(f"configs.{module}").get_config
    recipe = Recipe(get_config(variant) if variant else get_config())
    fields = recipe.config.train
    state = jax.eval_shape(functools.partial(initial_state, recipe.train_config), jax.random.key(0))
    step = functools.partial(train_step, recipe.train_config)
    images = jax.ShapeDtypeStruct((fields.batch_size, *recipe.model.image_shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((fields.batch_size,), jnp.int32)
    new_state, metrics = jax.eval_shape(step, state, images, labels, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
    assert metrics["block_norms"].shape == (recipe.model.num_blocks,)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.variables["params"]))
    assert parameters == expected_parameters(recipe.model)
    if name in PAPER_PARAMETERS:
        assert parameters == pytest.approx(PAPER_PARAMETERS[module], rel=0.02)


@pytest.mark.parametrize(
    "name", ["imagenet64_uncond", "imagenet64_cond_patch2", "imagenet64_likelihood", "imagenet128_cond"]
)
def test_the_other_tuned_variants_differ_in_what_paid_alone(name):
    get_config = importlib.import_module(f"configs.{name}").get_config
    paper, tuned = Recipe(get_config()).config, Recipe(get_config("tuned")).config
    assert (paper.optimizer.name, tuned.optimizer.name) == ("adamw", "muon")
    tuned.model.update({key: paper.model[key] for key in TUNED_FIELDS})
    tuned.optimizer = paper.optimizer
    assert tuned == paper


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="unknown variant 'huge'; expected likelihood, smoke"):
        importlib.import_module("configs.digits").get_config("huge")
