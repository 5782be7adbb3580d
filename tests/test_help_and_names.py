"""What a person reads: --help, and the names of classes."""

import re

import commands
import jax
import numpy as np
import pytest

from configs import digits
from launch import common
from launch.help import show
from tarflow_jax import data
from tarflow_jax.evaluation import distances
from tarflow_jax.figures import class_columns, class_names, class_rows, grid
from tarflow_jax.training import Recipe
from tarflow_jax.training.recipe import label_names

SMOKE = ("-m", "launch.train", "--config=configs/digits.py:smoke")


def test_help_is_quick_shows_examples_and_a_recipe_s_fields():
    code, out, err = commands.run("-X", "importtime", "-m", "launch.train", "--helpfull")
    assert code == 0
    assert "python -m launch.train --config=configs/digits.py" in out
    assert "  train.num_steps " in out
    assert "probability of training an image without its label" in out
    assert len(out.splitlines()) > len(show("train").splitlines()) + 20
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines()}
    assert "ast" in imported
    assert not imported & {"jax", "numpy", "absl", "tarflow_jax"}
    assert jax.__name__ not in imported


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_fits_a_screen_has_an_example_and_says_of_every_flag_what_it_does(command, monkeypatch):
    monkeypatch.setattr("launch.help._WIDTH", 110)  # of a terminal that is wide enough
    lines = show(command).splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 120
    assert any(line.strip().startswith(f"python -m launch.{command} --") for line in lines)
    flags = re.findall(r"^  --(\w+) +(.*)$", show(command), re.MULTILINE)
    assert {"compilation_cache", "traceback"} < {name for name, _ in flags}
    assert [name for name, text in flags if not re.match("[A-Z][^.]+", text)] == []
    assert command != "sample" or {"attention_temperature", "seed"} < {name for name, _ in flags}
    assert command != "evaluate" or all(re.search(rf"\b{metric}[,.]", show(command)) for metric in distances.METRICS)


def test_classes_have_names_where_the_data_set_has_them(tmp_path):
    source = data.ArraySource("npz:x", np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1]), 2, ("trouser", "sneaker"))
    Recipe(digits.get_config()).write_to(tmp_path, source)
    names = label_names(tmp_path)
    assert [common.class_number(text, names) for text in ("sneaker", "0", "-1")] == [1, 0, -1]
    with pytest.raises(ValueError, match="--labels has 'sneakers'; did you mean 'sneaker'"):
        common.class_number("sneakers", names)
    with pytest.raises(ValueError, match="expected a number or one of trouser, sneaker"):
        common.class_number("x", names)
    names = ("Bag", "bag", "Ankle boot")
    assert [common.class_number(text, names) for text in ("bag", "Bag", "ANKLE BOOT")] == [1, 0, 2]
    with pytest.raises(ValueError, match="--label has 'BAG'; did you mean 'Bag'"):
        common.class_number("BAG", names, "label")
    assert label_names(tmp_path / "none") == []


def test_figures_name_the_classes():
    images = np.zeros((6, 64, 64, 1), np.uint8)
    images[:, 0, 0, 0] = labels = np.array([0, 1, 2, 0, 1, 2])
    plain = grid(images[np.argsort(labels, kind="stable")], columns=2)
    named = class_rows(images, labels, ("trouser", "sneaker", "ankle boot"))
    margin = named[:, : -plain.shape[1]]
    np.testing.assert_array_equal(named[:, -plain.shape[1] :], plain)  # a row a class
    assert margin.shape[1] < 120
    rows = np.split(margin, [64, 130], axis=0)
    assert all((row < 128).sum() > 50 and (row[0] == row[-1]).all() for row in rows)  # written within each
    np.testing.assert_array_equal(class_rows(images, labels, ()), grid(images))
    columns = class_rows(images[:5], labels[:5], ("a", "b", "c"))
    plain = grid(images[:5], columns=3)
    np.testing.assert_array_equal(columns[: len(plain)], plain)  # a column a class
    captions = np.split(columns[len(plain) :], [65, 131], axis=1)
    assert len(captions[0]) < 30
    assert all((caption < 128).sum() > 5 and (caption[:, 0] == caption[:, -1]).all() for caption in captions)
    unnamed = (("a", "b"), ("a", "b", "far too long a name"), ())  # one too few; no room
    assert all((class_columns(images[:5], labels[:5], names) == plain).all() for names in unnamed)
    for shuffled in ([0, 1, 2, 1, 0], [1] * 5):
        np.testing.assert_array_equal(class_columns(images[:5], np.array(shuffled), ("a", "b", "c")), grid(images[:5]))
    assert class_names(np.array([1, -1]), ("a", "b")) == ["b", "none"]
