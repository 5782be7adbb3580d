"""What a person reads: --help, and the names of classes."""

import re
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import commands
from configs import digits
from launch import cli
from tarflow_jax import data
from tarflow_jax.evaluation import distances
from tarflow_jax.figures import class_columns, class_names, class_rows, grid
from tarflow_jax.options import described
from tarflow_jax.training import Recipe
from tarflow_jax.training.recipe import (
    AUTOENCODER_GROUPS,
    GROUPS,
    STUDENT_GROUPS,
    config_help,
    default_config,
    label_names,
)


@pytest.fixture(scope="module")
def helps():
    """What --helpfull prints, by command; forked from a process that has imported most of what they need."""
    program = (
        "import os, runpy, sys, warnings\n"
        "from launch import cli\n"
        "warnings.filterwarnings('ignore', '.*fork')\n"
        f"for name in {commands.COMMANDS}:\n"
        "    print(f'== {name}', flush=True)\n"
        "    if os.fork() == 0:\n"
        "        sys.argv = [name, '--helpfull']\n"
        "        runpy.run_module(f'launch.{name}', run_name='__main__', alter_sys=True)\n"
        "    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0\n"
    )
    code, out, err = commands.run("-c", program)
    assert code == 0, err
    return dict(part.split("\n", 1) for part in out.split("== ")[1:])


@pytest.mark.slow
@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_has_an_example_and_a_sentence_for_every_flag(command, helps):
    out = helps[command]
    assert any(line.strip().startswith(f"python -m launch.{command} --") for line in out.splitlines())
    flags = dict(re.findall(r"^  --(?:\[no\])?(\w+): +(?:<.*>: )?(.*)$", out, re.MULTILINE))
    assert {"compilation_cache", "traceback"} < flags.keys()
    assert [name for name, text in flags.items() if not re.match("[A-Z]", text)] == []
    assert not flags.keys() & {"pdb", "verbosity", "help"}  # absl's own
    assert ("  train.num_steps " in out) == ("config" in flags)
    assert command != "sample" or {"attention_temperature", "seed"} < flags.keys()
    assert command != "evaluate" or all(re.search(rf"\b{metric}[,.]", out) for metric in distances.METRICS)


@pytest.mark.slow
def test_documents_name_flags_and_recipes_that_exist(helps):
    root, commands_found, unknown = Path(__file__).parent.parent, set(), []
    options = set(flatten_dict(default_config(GROUPS | AUTOENCODER_GROUPS).to_dict(), sep="."))
    options |= {"train.num_steps", "decoder_of"}
    for file in (root / "README.md", *root.glob("docs/**/*.md"), *root.glob("configs/**/*.py")):
        text = file.read_text().replace("\\\n", " ")
        for name, rest in re.findall(r"python -m launch\.(\w+)([^\n`#|]*)", text):
            commands_found.add(name + rest)
            known = set(re.findall(r"^  --(?:\[no\])?(\w+):", helps[name], re.MULTILINE))
            for flag, recipe in re.findall(r"--([\w.]+)(?:=(configs/[\w/]+\.py))?", rest):
                exists = flag.removeprefix("config.") in options if flag.startswith("config.") else flag in known
                if not exists or (recipe and "NAME" not in recipe and not (root / recipe).exists()):
                    unknown.append(f"{file.relative_to(root)}: launch.{name} --{flag}={recipe}")
    assert unknown == []
    assert len(commands_found) > 40


@pytest.mark.parametrize("groups", [GROUPS, STUDENT_GROUPS], ids=["flow", "student"])
def test_every_option_of_a_recipe_has_a_sentence(groups):
    options = [(f"{group}.{name}", text) for group, cls in groups.items() for name, _, text in described(cls)]
    assert [name for name, text in options if not re.fullmatch("[A-Za-z].*[.]", text)] == []
    config = default_config(groups)
    assert {name for name, _ in options} == set(flatten_dict(config.to_dict(), sep="."))
    assert all(f"  {name} " in config_help(groups) for name, _ in options)
    assert max(map(len, config_help(groups).splitlines())) <= 120


def test_classes_have_names_where_the_data_set_has_them(tmp_path):
    source = data.ArraySource("npz:x", np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1]), 2, ("trouser", "sneaker"))
    Recipe(digits.get_config()).write_to(tmp_path, source)
    names = label_names(tmp_path)
    assert [cli.class_number(text, names) for text in ("sneaker", "0", "-1")] == [1, 0, -1]
    with pytest.raises(ValueError, match="--labels has 'sneakers'; did you mean 'sneaker'"):
        cli.class_number("sneakers", names)
    with pytest.raises(ValueError, match="expected a number or one of trouser, sneaker"):
        cli.class_number("x", names)
    names = ("Bag", "bag", "Ankle boot")
    assert [cli.class_number(text, names) for text in ("bag", "Bag", "ANKLE BOOT")] == [1, 0, 2]
    with pytest.raises(ValueError, match="--label has 'BAG'; did you mean 'Bag'"):
        cli.class_number("BAG", names, "label")
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
    few = np.resize([0, 1], 36)
    sheet = class_columns(np.zeros((36, 64, 64, 1), np.uint8), few, ("a", "b"))
    assert sheet.shape[1] == grid(np.zeros((6, 64, 64, 1), np.uint8), columns=6).shape[1]  # not 18 rows of two
    unnamed = (("a", "b"), ("a", "b", "far too long a name"), ())  # one too few; no room
    assert all((class_columns(images[:5], labels[:5], names) == plain).all() for names in unnamed)
    for shuffled in ([0, 1, 2, 1, 0], [1] * 5):
        np.testing.assert_array_equal(class_columns(images[:5], np.array(shuffled), ("a", "b", "c")), grid(images[:5]))
    assert class_names(np.array([1, -1]), ("a", "b")) == ["b", "none"]
