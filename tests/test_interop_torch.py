"""PyTorch checkpoints: bit-exact both ways, and nothing but one clear error from a bad file."""

import os
import subprocess
import sys

import numpy as np
import pytest

from commands import ROOT
from damage import full_disk
from lazy import Lazy
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.interop import load_torch, save_torch
from tarflow_jax.interop.tensors import flatten, unflatten
from tarflow_jax.runtime.parameters import variables_shapes

torch = Lazy("torch")
SMALL = TarFlowConfig((4, 4), 1, 2, width=64, num_blocks=2, layers_per_block=1, num_classes=2)
SMALL_ARGUMENTS = (4, 1, 2)


def random_variables(config):
    rng = np.random.default_rng(0)
    shapes = variables_shapes(config)
    return unflatten({name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})


@pytest.fixture
def small_file(tmp_path):
    path = tmp_path / "small.pth"
    save_torch(path, SMALL, random_variables(SMALL))
    return path


def read_state(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["cond", "vp", "training"])
def test_round_trip_is_exact(load_golden, tmp_path, name):
    golden = load_golden(name)
    save_torch(tmp_path / "back.pth", golden.config, golden.variables)
    reference, back = read_state(golden.path), read_state(tmp_path / "back.pth")
    assert back.keys() == reference.keys()
    for tensor_name, tensor in reference.items():
        assert torch.equal(back[tensor_name], tensor)
        assert back[tensor_name].dtype == tensor.dtype


def test_reads_config_off_the_tensors(load_golden):
    config = load_golden("vp").config
    assert config == TarFlowConfig((8, 8), 3, 2, 64, 2, 2, 0, volume_preserving=True)
    assert load_golden("cond").config == TarFlowConfig((12, 12), 1, 3, 128, 4, 1, 5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_becomes_float32(small_file, dtype):
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in read_state(small_file).items()}
    torch.save(state, small_file)
    _, variables = load_torch(small_file, *SMALL_ARGUMENTS)
    bias = variables["params"]["block_0"]["layers"]["mlp_in"]["bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias[0], state["blocks.0.attn_blocks.0.mlp.main.0.bias"].float().numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 1, 2), "has 4 tokens, but 9 patches of 2 fill an image of 6x6; check image_size and patch_size"),
        ((4, 3, 2), "has tokens of 4 numbers, but patches of 2 in 3 channels have 12; check image_channels"),
        ((2, 1, 1), "has tokens of 4 numbers"),
        ((5, 1, 2), "not divisible by patch_size"),
    ],
)
def test_contradictions_are_named(small_file, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_torch(small_file, *arguments)


class Payload:
    """Runs code when it is unpickled by a reader that allows it."""

    def __reduce__(self):
        return print, ("pickled code ran",)


def drop(state):
    del state["blocks.1.attn_blocks.0.mlp.norm.bias"]


def add(state):
    state["blocks.0.extra"] = torch.zeros(2)


def reshape(state):
    state["blocks.1.proj_in.weight"] = torch.zeros(64, 5)


def unmask(state):
    state["blocks.1.attn_mask"][0, 3] = 1


def vary(state):
    state["var"][2, 1] = 2


def use_integers(state):
    state["blocks.0.proj_in.bias"] = torch.zeros(64, dtype=torch.int32)


def use_doubles(state):
    state["blocks.0.proj_in.bias"] = torch.zeros(64, dtype=torch.float64)


def nest(state):
    state["model"] = dict(state)


def add_code(state):
    state["blocks.0.proj_in.bias"] = Payload()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "lacks tensor blocks.1.attn_blocks.0.mlp.norm.bias"),
        (add, "has tensor blocks.0.extra, which no model of this shape has"),
        (reshape, r"blocks.1.proj_in.weight has shape \[64, 5\]; expected \[64, 4\]"),
        (unmask, "buffer blocks.1.attn_mask has other values"),
        (vary, "buffer var has other values"),
        (use_integers, "blocks.0.proj_in.bias is torch.int32"),
        (use_doubles, "blocks.0.proj_in.bias is torch.float64"),
        (nest, "no state dict of tensors"),
        (add_code, "holds more than tensors, and other objects are never loaded; save"),
    ],
)
def test_malformed_state_is_refused(small_file, capsys, change, message):
    state = read_state(small_file)
    change(state)
    torch.save(state, small_file)
    with pytest.raises(ValueError, match=message) as caught:
        load_torch(small_file, *SMALL_ARGUMENTS)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", bytes(1000)])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not an intact PyTorch state dict"):
        load_torch(path, *SMALL_ARGUMENTS)


@pytest.mark.parametrize("case", ["legacy", "module", "tensor", "list", "names", "cut"])
def test_other_things_that_pytorch_writes_are_refused(small_file, tmp_path, case):
    path, state = tmp_path / "other.pth", read_state(small_file)
    if case == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
        message = "is not an intact PyTorch state dict, as torch.save writes it since 1.6: File is not a zip file"
    elif case == "module":
        torch.save(torch.nn.Linear(2, 2), path)
        message = r"it holds more than tensors, .*; save `model.state_dict"
    else:
        others = {"tensor": torch.zeros(3), "list": [torch.zeros(3)], "names": {1: torch.zeros(3)}}
        torch.save(others.get(case, state), path)
        message = "holds no state dict of tensors; save `model.state_dict"
    if case == "cut":
        os.truncate(path, path.stat().st_size - 10)
        message = "is not an intact PyTorch state dict"
    with pytest.raises(ValueError, match=message) as caught:
        load_torch(path, *SMALL_ARGUMENTS)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_parameters_and_views_are_read(small_file):
    state, good = read_state(small_file), flatten(load_torch(small_file, *SMALL_ARGUMENTS)[1])
    for name, tensor in state.items():
        if tensor.ndim == 2 and "attn_mask" not in name:
            state[name] = tensor.T.contiguous().T  # other strides
    state["blocks.1.proj_in.bias"] = torch.nn.Parameter(state["blocks.1.proj_in.bias"])
    torch.save(state, small_file)
    for name, array in flatten(load_torch(small_file, *SMALL_ARGUMENTS)[1]).items():
        np.testing.assert_array_equal(array, good[name])


def test_a_full_disk_leaves_the_file_as_it_was(small_file):
    before = small_file.read_bytes()
    # PyTorch says nothing of the cause, but then the file is closed, which fails for the same.
    failed = pytest.raises((ValueError, OSError), match=r"is the disk full\?$|File too large")
    with full_disk(len(before) // 2), failed:
        save_torch(small_file, SMALL, random_variables(SMALL))
    assert [path.read_bytes() for path in small_file.parent.iterdir()] == [before]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no PyTorch checkpoint at"):
        load_torch(tmp_path / "none.pth", *SMALL_ARGUMENTS)


def test_missing_torch_says_what_to_install(small_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        load_torch(small_file, *SMALL_ARGUMENTS)


@pytest.mark.slow
def test_importing_needs_no_extra():
    code = "import sys; sys.modules.update(torch=None); import tarflow_jax; print('fine')"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "fine\n"


@pytest.mark.slow
def test_drawing_imports_neither_torch_nor_what_only_training_needs():
    unwanted = {"torch", "tensorflow", "tensorboardX", "grain"}
    code = f"import sys; from launch import sample; print({unwanted} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "set()\n"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TarFlowConfig((4, 8), 1, 2, 64, 1, 1), "only square images"),
        (TarFlowConfig((4, 4), 1, 2, 64, 2, (1, 2)), "blocks of equal depth"),
        (TarFlowConfig((4, 4), 1, 2, 64, 1, 1, head_dim=32), "has head_dim 64"),
        (TarFlowConfig((4, 4), 1, 2, 64, 1, 1, rotary=True), "has rotary False"),
        (TarFlowConfig((4, 4), 1, 2, 64, 1, 1, input_limit=8), "has input_limit 0.0; this model's is 8"),
        (TarFlowConfig((4, 4), 1, 2, 64, 1, 1, triangular=True), "has triangular False"),
    ],
)
def test_what_the_reference_cannot_hold_is_not_written(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        save_torch(tmp_path / "x.pth", config, random_variables(config))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_damaged_files_are_refused_or_read_the_same(small_file, damage):
    _, good = load_torch(small_file, *SMALL_ARGUMENTS)
    good, errors = flatten(good), []
    for path in damage(small_file, 200):
        try:
            _, variables = load_torch(path, *SMALL_ARGUMENTS)
        except ValueError as error:
            errors.append(str(error))
        else:
            for name, array in flatten(variables).items():
                np.testing.assert_array_equal(array, good[name])
    assert len(errors) > 150  # the rest hit bytes that say nothing: padding and dates
    assert not any("\n" in error for error in errors)
