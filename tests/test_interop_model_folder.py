"""Saved models: exact, versioned, and either read as they were written or refused in one line."""

import hashlib
import json
import re
import struct
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from PIL import Image

from damage import full_disk
from tarflow_jax import TarFlowPipeline
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.interop import SavedModel, load_model, save_model
from tarflow_jax.interop.model_folder import checksum
from tarflow_jax.interop.tensors import flatten, unflatten
from tarflow_jax.noise import Noise
from tarflow_jax.runtime.parameters import variables_shapes
from tiny_models import TINY
from tiny_models import random_variables as tiny_variables

CONFIG = TarFlowConfig((4, 8), 3, 2, 64, 2, (1, 2), 3, volume_preserving=True, head_dim=32)
NOISE = Noise("gaussian", 0.1)


def random_variables(seed=0):
    rng = np.random.default_rng(seed)
    shapes = variables_shapes(CONFIG)
    return unflatten({name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})


def assert_same(tree, other):
    flat, other = flatten(tree), flatten(other)
    assert flat.keys() == other.keys()
    for name in flat:
        assert flat[name].dtype == other[name].dtype
        np.testing.assert_array_equal(flat[name], other[name])


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", SavedModel(CONFIG, random_variables(), NOISE))
    return tmp_path / "model"


def rewrite_config(folder, **changes):
    """Changes fields of config.json as a stranger would who knows the layout, checksum included."""
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    del fields["sha256"]
    fields = {name: value for name, value in fields.items() if value is not ...}
    path.write_text(json.dumps({**fields, "sha256": checksum(fields)}))


def rewrite_weights(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    weights = json.loads((folder / "config.json").read_text())["weights"]
    digest = hashlib.sha256(content).hexdigest()
    rewrite_config(folder, weights={**weights, "sha256": digest})


def rewrite_header(folder, change):
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    head = json.dumps(header).encode()
    rewrite_weights(folder, struct.pack("<Q", len(head)) + head + content[8 + length :])


@pytest.mark.parametrize("noise", [NOISE, Noise("uniform"), None])
def test_round_trip_is_exact(tmp_path, noise):
    variables, ema = random_variables(), random_variables(1)["params"]
    save_model(tmp_path, SavedModel(CONFIG, variables, noise, ema))
    saved = load_model(tmp_path)
    assert (saved.config, saved.noise) == (CONFIG, noise)
    assert_same(saved.variables, variables)
    assert_same(saved.ema_params, ema)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(saved.variables))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_whoever_may_read_one_file_may_read_all(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_bfloat16_halves_the_file_and_spares_the_prior(folder, tmp_path):
    variables = random_variables()
    save_model(tmp_path / "half", SavedModel(CONFIG, variables), dtype="bfloat16")
    saved = load_model(tmp_path / "half")
    np.testing.assert_array_equal(saved.variables["prior"]["variance"], variables["prior"]["variance"])
    rounded = jax.tree.map(lambda x: np.asarray(jax.numpy.bfloat16(x)).astype(np.float32), variables["params"])
    assert_same(saved.variables["params"], rounded)
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "half", folder)]
    assert 0.45 < sizes[0] / sizes[1] < 0.55
    assert saved.ema_params is None


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_replaces_a_model_and_leaves_other_files(folder):
    for name in ("notes.txt", "decoder.json", "student/notes.txt"):  # earlier versions wrote and read decoder.json
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    save_model(folder, SavedModel(CONFIG, random_variables(2)))
    assert_same(load_model(folder).variables, random_variables(2))
    assert (folder / "notes.txt").read_text() == (folder / "student" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "my notes"),
        ("model.safetensors", "weights of another program"),
        ("samples.png", "a picture"),
        ("student/marks.csv", "1,2"),
        ("config.json", '{"train": {}}'),
        ("config.json", '{"format": "tarflow_jax student"}'),
        ("config.json", "[]"),
        ("config.json", "{"),
        ("config.json", "[" * 100_000),
    ],
)
def test_files_that_are_no_saved_model_s_are_never_replaced(tmp_path, name, text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"holds {name.split('/')[0]}, which is not a saved model's; choose another"):
        save_model(tmp_path, SavedModel(CONFIG, random_variables()))
    assert contents(tmp_path) == before


def test_a_picture_beside_a_model_whose_card_does_not_show_it_stays(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    (folder / "samples.png").write_text("mine")
    save_model(folder, SavedModel(CONFIG, random_variables()))
    with pytest.raises(ValueError, match=r"holds samples\.png, which is not a saved model's"):
        save_model(folder, SavedModel(CONFIG, random_variables(), card={"samples": tmp_path / "grid.png"}))
    assert (folder / "samples.png").read_text() == "mine"


@pytest.mark.parametrize("path", ["", None, 7])
def test_what_is_no_path_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", SavedModel(CONFIG, random_variables()))
    monkeypatch.chdir(tmp_path / "model")
    for call in (load_model, TarFlowPipeline.from_pretrained, lambda p: save_model(p, SavedModel(CONFIG, {}))):
        with pytest.raises(ValueError, match=f"the model's folder is {path!r}; expected a path"):
            call(path)


def test_a_file_is_no_folder_to_save_in(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ValueError, match="model is a file; choose"):
        save_model(tmp_path / "model", SavedModel(CONFIG, random_variables()))
    assert contents(tmp_path) == {Path("model"): b"mine"}


@pytest.mark.parametrize("largest", ["model.safetensors", "README.md"])
def test_a_full_disk_leaves_the_folder_as_it_was(folder, largest):
    card = {"metrics": dict.fromkeys(map(str, range(80_000 if largest == "README.md" else 0)), 1.0)}
    save_model(folder, SavedModel(CONFIG, random_variables(), card=card))
    before = contents(folder)
    assert max(before, key=lambda path: len(before[path])) == Path(largest)
    with full_disk(len(before[Path(largest)]) - 1), pytest.raises((ValueError, OSError), match="File too large"):
        save_model(folder, SavedModel(CONFIG, random_variables(1), card=card))
    assert contents(folder) == before


def test_nothing_half_written(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    wrong = random_variables()
    wrong["params"]["block_1"]["project_in"]["bias"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError, match=r"project_in/bias has shape \[7\]; expected \[64\]"):
        save_model(folder, SavedModel(CONFIG, wrong))
    with pytest.raises(ValueError, match="unknown model card field 'author'; expected one of name"):
        save_model(folder, SavedModel(CONFIG, random_variables(), card={"author": "me"}))
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        save_model(folder, SavedModel(CONFIG, random_variables()), dtype="int8")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_model_card(tmp_path):
    card = {
        "name": "Digits",
        "datasets": ["digits"],
        "training": {"steps": 1200},
        "metrics": {"test loss (nats per dimension)": -1.05},
    }
    save_model(tmp_path, SavedModel(CONFIG, random_variables(), NOISE, card=card))
    text = (tmp_path / "README.md").read_text()
    header = huggingface_hub.ModelCard(text).data
    assert (header.library_name, header.datasets) == ("tarflow_jax", ["digits"])
    assert header.pipeline_tag == "image-generation"
    assert "\n# Digits\n" in text
    for row in (
        "| steps | 1200 |",
        "| test loss (nats per dimension) | -1.05 |",
        "conditional on 3 classes",
        "| shape | 2 blocks of 1 + 2 layers, patch 2, width 64 |",
    ):
        assert row in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "conditions"),
    [
        ({}, "affine, unconditional"),
        ({"condition_dim": 2, "condition_kind": "tokens"}, "affine, conditional on numbers [4, 2]"),
        (None, "conditional on 3 classes"),
    ],
    ids=str,
)
def test_the_code_of_a_model_card_runs_and_it_names_the_conditions(shape, conditions, tmp_path):
    sizes = {"width": 16, "head_dim": 8, "num_blocks": 2, "layers_per_block": 1}
    config = TINY if shape is None else TarFlowConfig(sequence_shape=(4, 2), **sizes, **shape)
    TarFlowPipeline(config, tiny_variables(config), NOISE).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"{conditions} |" in card
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(code.replace("path/of/this/folder", str(tmp_path)), names)
    assert names["latents"].shape == (16, *config.data_shape)
    assert names["log_det"].shape == (16,)


def model_fields(**changes):
    return {"model": {**CONFIG.to_dict(), **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is not a model's of layout version 1"),
        ({"format_version": 7}, "is not a model's of layout version 1"),
        ({"noise": ...}, "lacks fields of layout version 1"),
        ({"noise": {"kind": "pink", "std": 0.1}}, "noise.kind is 'pink'"),
        ({"noise": 3}, "config.json"),
        ({"model": None}, "model is None; expected an object"),
        ({"weights": {"ema": False}}, "lacks fields of layout version 1"),
        (model_fields(width="64"), "model.width is '64'"),
        (model_fields(widht=64), "unknown model field 'widht'; did you mean 'width'?"),
        (model_fields(width=128), r"has shape \[[0-9, ]+\]; expected"),
        (model_fields(layers_per_block=[2, 2]), r"has shape \[[0-9, ]+\]; expected"),
        (model_fields(num_classes=10**15), r"has shape \[[0-9, ]+\]; expected"),
        (model_fields(num_blocks=3, layers_per_block=1), "lacks tensor params/block_2"),
        (model_fields(volume_preserving=False), "has tensor prior/variance, which no model"),
    ],
)
def test_wrong_config_is_refused(folder, changes, message):
    rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"format": "tarflow_jax"}', " " * (2 << 20)])
def test_config_that_is_none_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(folder)


def test_edited_config_is_refused(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace("0.1", "0.3"))
    with pytest.raises(ValueError, match="does not match its own checksum"):
        load_model(folder)


def grow(header):
    header["params/block_0/project_in/bias"]["shape"] = [1 << 40]


def point_outside(header):
    header["prior/variance"]["data_offsets"][1] += 4096


def overlap(header):
    header["params/block_0/project_in/bias"]["data_offsets"] = [0, 256]


def retype(header):
    header["params/block_0/project_in/bias"]["dtype"] = "I32"


def lose(header):
    del header["prior/variance"]


@pytest.mark.parametrize("change", [grow, point_outside, overlap, retype, lose])
def test_lying_header_is_refused(folder, change):
    rewrite_header(folder, change)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, struct.pack("<Q", 1 << 60), struct.pack("<Q", 2) + b"{}"])
def test_weights_that_are_none_are_refused(folder, content):
    rewrite_weights(folder, content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in"):
        load_model(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_files_are_refused_or_read_the_same(folder, damage, name):
    good, errors = load_model(folder), []
    for _ in damage(folder / name, 100):
        try:
            saved = load_model(folder)
        except ValueError as error:
            errors.append(str(error))
        else:
            assert (saved.config, saved.noise) == (good.config, good.noise)
            assert_same(saved.variables, good.variables)
    assert len(errors) > 90  # the rest are config.json's white space
    assert not any("\n" in error for error in errors)


def test_hub_names(folder, monkeypatch):
    def download(name, allow_patterns):
        assert {"config.json", "model.safetensors", "student/config.json"} <= set(allow_patterns)
        if name != "owner/digits":
            raise OSError("Connection refused\nand more")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("owner/digits").config == CONFIG
    with pytest.raises(FileNotFoundError, match=r"is there a network.*Connection refused$"):
        load_model("owner/other")
    with pytest.raises(FileNotFoundError, match="no folder not/a/name"):
        load_model("not/a/name")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_model(folder / "config.json")


def test_hub_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder owner/digits, and the hub") as caught:
        load_model("owner/digits")
    assert "\n" not in str(caught.value)
