"""The table of parameters is the network's: its names, its shapes, and a row each."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tarflow_jax.flow import Conditioning, TarFlow, TarFlowConfig
from tarflow_jax.interop.tensors import flatten
from tarflow_jax.runtime.parameters import PARAMETERS, params_shapes, row_of, variables_shapes


def made_shapes(config):
    """Shapes of the variables that the network makes, by name."""
    images, conditioning = np.zeros((1, *config.data_shape), np.float32), Conditioning(noise_std=np.ones(1, np.float32))
    made = flatten(jax.eval_shape(lambda: TarFlow(config).init(jax.random.key(0), images, conditioning)))
    return {name: leaf.shape for name, leaf in made.items() if not name.startswith("intermediates")}


@pytest.mark.parametrize("depths", [2, (1, 3)], ids=str)
@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("volume_preserving", [False, True], ids=["nvp", "vp"])
@pytest.mark.parametrize("extended", [False, True], ids=["plain", "triangular-noise"])
def test_table_has_the_names_and_shapes_that_the_network_makes(depths, num_classes, volume_preserving, extended):
    config = TarFlowConfig(
        (4, 8),
        3,
        2,
        128,
        2,
        depths,
        num_classes,
        volume_preserving,
        head_dim=32,
        triangular=extended,
        noise_conditional=extended,
    )
    made = made_shapes(config)
    assert variables_shapes(config) == made
    assert params_shapes(config) == {
        name.removeprefix("params/"): made[name] for name in made if name.startswith("params/")
    }


def test_every_variable_has_one_row_and_every_row_a_variable():
    config = TarFlowConfig((4, 8), 3, 2, 128, 2, 1, num_classes=5, volume_preserving=True, head_dim=32)
    config = dataclasses.replace(config, triangular=True, noise_conditional=True)
    options = {"head_dim": 8, "condition_dim": 2, "condition_kind": "tokens", "orders": "random"}
    sequences = TarFlowConfig(sequence_shape=(3, 2), width=16, num_blocks=2, layers_per_block=1, **options)
    assert variables_shapes(sequences) == made_shapes(sequences)
    options = {"condition_dim": 2, "condition_kind": "prefix", "condition_length": 2, "condition_blocks": 1}
    options |= {"head_dim": 8, "start_token": True, "final_norm": True, "position_init": "none"}
    prefixed = TarFlowConfig(sequence_shape=(3, 2), width=16, num_blocks=2, layers_per_block=1, **options)
    assert variables_shapes(prefixed) == made_shapes(prefixed)
    names = made_shapes(config) | made_shapes(sequences) | made_shapes(prefixed)
    assert {row_of(name) for name in names} == set(PARAMETERS)
    for name in ("params/block_0/unheard_of", "params/block_0/my_project_in/kernel"):
        with pytest.raises(ValueError, match=f"{name} matches no row"):
            row_of(name)


def test_what_follows_from_a_row():
    config = TarFlowConfig((4, 8), 3, 2, 128, 2, 1, head_dim=32)
    kernel = row_of("opt_state/0/mu/block_1/layers/attention_out/kernel")  # "N:tensor H -> C:fsdp"
    assert kernel.letters == ("L", "N", "H", "C")
    assert (kernel.input_axes, kernel.output_axes) == ((1, 2), (3,))
    assert kernel.spec == P(None, "tensor", None, "fsdp")
    assert kernel.shape(config, depth=3) == (3, 4, 32, 128)
    assert kernel.torch_shape(config) == (128, 128)
    bias = row_of("params/block_0/layers/qkv/bias")  # "-> 3 N:tensor H"
    assert (bias.input_axes, bias.output_axes) == ((), (1, 2, 3))
    assert bias.torch_shape(config) == (3 * 128,)
    embedding = row_of("params/block_0/position_embedding")  # "T C:fsdp"
    assert (embedding.input_axes, embedding.output_axes) == ((), ())
    assert embedding.torch_shape(config) == embedding.shape(config, depth=3) == (8, 128)
