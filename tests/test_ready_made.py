"""Models by name: found in a clone or in the package tarflow_jax_models, else on the hub; and judges of data sets."""

import importlib.machinery
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import commands
from benchmarks import ready_made
from tarflow_jax import Noise, TarFlowPipeline
from tarflow_jax.data import ArraySource, open_source
from tarflow_jax.evaluation import classifier
from tarflow_jax.interop import READY_MADE, model_folder
from tiny_models import TINY, random_variables

DATA = Path(__file__).parent / "data"
JUDGES = "judges/*/judge.json"
NAMES = tuple(map(str, range(TINY.num_classes)))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the installed package, with a model named tiny."""
    pipe = TarFlowPipeline(TINY, random_variables(TINY), Noise("gaussian", 0.1), label_names=NAMES)
    pipe.save_pretrained(tmp_path / "tiny")
    spec = importlib.machinery.ModuleSpec("tarflow_jax_models", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if "models" in name else find_spec(name))
    return pipe


def test_a_model_of_the_package_is_opened_by_its_name(package):
    found = TarFlowPipeline.from_pretrained("tiny")
    assert found.label_names == NAMES
    jax.tree.map(np.testing.assert_array_equal, found.variables, package.variables)


def test_a_folder_without_a_model_does_not_hide_a_ready_made_one_but_a_model_does(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "tiny")
    (tmp_path / "tiny" / "tiny").mkdir()  # as samples of it are kept in
    assert model_folder.local_folder("tiny") == tmp_path / "tiny"
    TarFlowPipeline(TINY, random_variables(TINY, 1)).save_pretrained("tiny")
    assert TarFlowPipeline.from_pretrained("tiny").label_names == ()


def test_an_unknown_name_is_answered_with_those_that_exist():
    with pytest.raises(FileNotFoundError, match=r"no folder digit; .*, or one of digits, digits_likelihood"):
        TarFlowPipeline.from_pretrained("digit")


def test_names_that_are_nowhere_here_are_asked_of_the_hub(monkeypatch):
    monkeypatch.setattr(model_folder, "ready_made", dict)
    asked = []

    def download(name, **_):
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="no network"):
        TarFlowPipeline.from_pretrained(READY_MADE[0])
    assert asked == [f"{model_folder.HUB_OWNER}/{READY_MADE[0]}"]


def test_a_config_that_names_another_number_of_classes_is_refused(package, tmp_path):
    package.label_names = NAMES[:1]
    package.save_pretrained(tmp_path / "few")
    with pytest.raises(ValueError, match=f"names 1 classes; expected {TINY.num_classes}"):
        TarFlowPipeline.from_pretrained(tmp_path / "few")


@pytest.mark.parametrize(
    "name", [name if name == "digits" else pytest.param(name, marks=pytest.mark.slow) for name in READY_MADE]
)
def test_a_ready_made_model_draws_the_samples_and_has_the_log_prob_that_it_had(name):
    drawn = ready_made.draw(TarFlowPipeline.from_pretrained(name))
    recorded = np.load(DATA / "ready_made.npz")  # by benchmarks/ready_made.py
    samples = recorded[f"{name}/samples"]
    assert np.linalg.norm(drawn["samples"] - samples) <= 1e-4 * np.linalg.norm(samples)
    if name != "emoji64":  # single pixels of which differ by 2e-4 between compiler options
        np.testing.assert_allclose(drawn["samples"], samples, atol=1e-4)
    np.testing.assert_allclose(drawn["log_prob"], recorded[f"{name}/log_prob"], rtol=1e-4)


def test_ready_made_models_are_in_the_clone_and_small():
    assert set(model_folder.ready_made()) == set(READY_MADE)
    sizes = [sum(file.stat().st_size for file in folder.rglob("*")) for folder in model_folder.ready_made().values()]
    judges = [path.with_name("model.safetensors").stat().st_size for path in model_folder.shipped(JUDGES).values()]
    assert max(sizes) <= 12e6
    assert max(judges) <= 2.5e6
    assert sum(judges) <= 4.2e6
    assert sum(sizes) <= 40e6


def test_the_judge_of_digits_is_as_good_as_it_says_and_no_other_classifier_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "train_classifier", lambda *_, **__: pytest.fail("trained"))
    train, test = (open_source("digits", split) for split in ("train", "test"))
    network = classifier.classifier_network(train, test, tmp_path)
    stated = json.loads(model_folder.shipped(JUDGES)["digits"].read_text())
    assert (network(test.images).logits.argmax(1) == test.labels).mean() == pytest.approx(stated["accuracy"], abs=1e-9)
    assert network.identity.startswith(f"judge digits, sha256 {stated['sha256']} (test accuracy 0.9394; ")
    assert list(tmp_path.iterdir()) == []
    for others in (ArraySource("digits", test.images, (test.labels + 1) % 10, 10), test):  # wrong labels; another name
        others.name = "digits" if others is not test else "npz:digits.npz"
        with pytest.raises(pytest.fail.Exception, match="trained"):
            classifier.classifier_network(others, others, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("judge.json", lambda content: content[:-9], r"judge.json or model.safetensors beside it is damaged \("),
        (
            "judge.json",
            lambda content: content.replace(b'"sha256": "1', b'"sha256": "2'),
            "does not match the checksum",
        ),
        ("model.safetensors", lambda content: content[:-4] + b"\0\0\0\1", "does not match the checksum in it.*; copy"),
    ],
)
def test_a_damaged_judge_is_refused_in_one_line(name, change, message, tmp_path, monkeypatch):
    train = open_source("digits", "train")
    folder = shutil.copytree(model_folder.shipped(JUDGES)["digits"].parent, tmp_path / "digits")
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    monkeypatch.setattr(classifier, "shipped", lambda _: {"digits": folder / "judge.json"})
    with pytest.raises(ValueError, match=message) as caught:
        classifier.read_judge(train)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_figure_of_a_card_is_measured_again(tmp_path):
    code, _, err = commands.run(
        "-m", "launch.evaluate", "--model=digits_likelihood", "--data=digits", "--metrics=bits_per_dim",
        "--dequantisation_draws=10", f"--out={tmp_path}",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(next(tmp_path.glob("*.json")).read_text())["results"]["bits_per_dim"]["bits/dim"]
    card = (model_folder.ready_made()["digits_likelihood"] / "README.md").read_text()
    assert f"| {found:.5g} |" in card
