"""Sweeps: points, names of runs, the report, and the command itself on two runs of digits."""

import csv
import importlib
import json
import random
import time

import pytest

import commands
from configs import digits
from configs.sweeping import grid, log_uniform, sampled, zipped
from launch.sweep import Row, Run, plan, read_rows, run_name, write_table

LOSS = "test loss (nats/dim, less ½ log 2π)"


def test_points():
    assert grid({"a": [1, 2], "b": [3, 4]}) == [
        {"a": 1, "b": 3},
        {"a": 1, "b": 4},
        {"a": 2, "b": 3},
        {"a": 2, "b": 4},
    ]
    assert zipped({"a": [1, 2], "b": [3, 4]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(ValueError, match="shorter"):
        zipped({"a": [1, 2], "b": [3]})
    fields = {"a": log_uniform(1e-4, 1e-2), "b": random.Random.random}
    points = sampled(20, fields, seed=1)
    assert points[:3] == sampled(3, fields, seed=1)
    assert points != sampled(20, fields, seed=2)
    generator = random.Random(1)
    for point in points:
        exact = 1e-4 * 100 ** generator.random()  # uniform between the logarithms
        assert f"{point['a']:g}" == f"{exact:.3g}"
        assert point["b"] == generator.random()


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"noise.std": 0.1, "sample.guidance.weight": 2.0}, "noise.std=0.1,sample.guidance.weight=2"),
        ({"optimizer.learning_rate": 1e-5}, "optimizer.learning_rate=1e-05"),
        ({"data.source": "folder:/a b"}, "data.source=folder__a_b-2ac4adfd"),
        ({"data.source": "folder:/a/b"}, "data.source=folder__a_b-fa639602"),
        ({"data.source": "../.."}, "data.source=.._..-07bcc2dd"),
    ],
)
def test_runs_are_named_by_their_overrides_safely(overrides, name):
    assert run_name(overrides) == name


def test_long_names_are_cut_and_stay_different():
    names = {run_name({"data.source": f"{'x' * 300}{i}"}) for i in range(3)}
    assert len(names) == 3
    assert max(map(len, names)) < 200


def recipe_file(folder, sweep, more=""):
    path = folder / "recipe.py"
    path.write_text(f"from configs.sweeping import *\n{more}\ndef sweep():\n    return {sweep}\n")
    return str(path)


def config():
    config = digits.get_config("smoke")
    config.lock()
    return config


def test_a_plan_holds_each_run_s_commands_and_settings(tmp_path):
    source = recipe_file(
        tmp_path, "[{'noise.std': 1}, {'train.seed': 2}]", "EVALUATE = ['--metrics=fid', '--guidance=0,1']"
    )
    first, second = plan(config(), f"{source}:smoke", {"train.num_steps": 3}, tmp_path)
    # Fields that a point does not set have the recipe's value.
    assert first.settings == {"noise.std": 1.0, "train.seed": 0}
    assert second.settings == {"noise.std": 0.1, "train.seed": 2}
    train, evaluate = first.commands.values()
    folder = tmp_path / "noise.std=1"
    assert train[1:] == (
        "-m",
        "launch.train",
        f"--config={source}:smoke",
        f"--workdir={folder}",
        "--config.train.num_steps=3",
        "--config.noise.std=1",
    )
    module, workdir, out, *evaluation_flags = evaluate[2:]
    assert (module, workdir) == ("launch.evaluate", f"--workdir={folder}")
    assert evaluation_flags == ["--metrics=fid", "--guidance=0,1"]
    assert list(first.commands) == ["results.json", f"{out.removeprefix(f'--out={folder}/')}/*.json"]
    several = recipe_file(tmp_path, "[{'noise.std': 1}]", "EVALUATE = [['--guidance=0'], ['--guidance=1']]")
    (run,) = plan(config(), several, {}, tmp_path)
    assert [command[5:] for command in list(run.commands.values())[1:]] == [("--guidance=0",), ("--guidance=1",)]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("[]", r"has no sweep\(\) that returns overrides"),
        ("[{}]", r"has no sweep\(\) that returns overrides"),
        ("[{'noise.stdd': 1}]", 'noise.stdd=1: .*Did you mean "std"'),
        ("[{'train.num_steps': 1.5}]", "train.num_steps=1.5: .*cannot be casted"),
        ("[{'train.seed': 1}, {'model.patch_size': 3}]", "model.patch_size=3: .*not divisible by patch_size"),
        ("[{'train.log_every': 1}]", r"--config\.train\.log_every was given, but the sweep sets it"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_runs(tmp_path, sweep, message):
    with pytest.raises(ValueError, match=message):
        plan(config(), recipe_file(tmp_path, sweep), {"train.log_every": 5}, tmp_path)


@pytest.mark.parametrize(
    ("name", "runs", "commands"),
    [("depth", 12, 2), ("deep_last", 3, 2), ("noise", 15, 5), ("guidance", 3, 5), ("patches", 9, 2)],
)
def test_the_sweeps_of_the_paper_s_claims_can_be_planned(tmp_path, name, runs, commands):
    module = importlib.import_module(f"configs.sweeps.{name}")
    found = plan(module.get_config(), module.__file__, {}, tmp_path)
    assert [len(run.commands) for run in found] == [commands] * runs
    if name == "depth":
        assert {run.recipe.model.num_blocks * run.recipe.model.layers_per_block for run in found} == {8}


def run_of(folder, settings, *results):
    """A run that has these files."""
    return Run(folder, dict.fromkeys(results, ()), None, settings)


def test_rows_of_a_training_and_of_its_samples(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({LOSS: -1.5}))
    assert read_rows(run_of(tmp_path, {"noise.std": 0.1}, "results.json")) == [Row({"noise.std": 0.1}, {LOSS: -1.5})]
    # As launch.evaluate writes it.
    samples = [
        {"guidance": weight, "denoised": True, "not finite": 0, "Fréchet distance": 9.0 - weight}
        for weight in (0.0, 1.0)
    ]
    found = {"classification": {"accuracy": 0.5, "histogram": [1, 2]}, "samples": samples}
    (tmp_path / "evaluation.json").write_text(json.dumps({"protocol": {}, "results": found}))
    rows = read_rows(run_of(tmp_path, {"noise.std": 0.1}, "results.json", "evaluation.json"))
    assert rows[1] == Row(
        {"noise.std": 0.1, "guidance": 1.0, "denoised": True},
        {LOSS: -1.5, "accuracy": 0.5, "not finite": 0, "Fréchet distance": 8.0},
    )


def test_rows_of_several_evaluations_have_the_flags_in_which_these_differ(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({LOSS: -1.5}))
    evaluations = [tmp_path / f"{multiplier}.json" for multiplier in (0.5, 1.0)]
    for path in evaluations:
        protocol = {"decoder": "sequential", "denoise_multiplier": float(path.stem), "seed": 0}
        samples = [{"guidance": 1.0, "distance": float(path.stem) + 3}]
        path.write_text(json.dumps({"protocol": protocol, "results": {"samples": samples}}))
    assert read_rows(run_of(tmp_path, {}, "results.json", "0.5.json", "1.0.json")) == [
        Row({"guidance": 1.0, "denoise_multiplier": 0.5}, {LOSS: -1.5, "distance": 3.5}),
        Row({"guidance": 1.0, "denoise_multiplier": 1.0}, {LOSS: -1.5, "distance": 4.0}),
    ]


def test_seeds_become_means_and_spreads(tmp_path):
    points = grid({"train.seed": [0, 1, 2], "a": [1, 2]})
    rows = [Row(point, {LOSS: float(i)}) for i, point in enumerate(points)]  # 0, 2, 4 of a = 1, and 1, 3, 5
    table = write_table(rows, tmp_path)
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["|", "1", "|", "2", "±", "2", "|"],
        ["|", "2", "|", "3", "±", "2", "|"],
    ]
    assert (tmp_path / "sweep.md").read_text().rstrip("\n") == table
    with (tmp_path / "sweep.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert lines[1] == {"train.seed": "0", "a": "2", LOSS: "1.0"}


TINY = """
from configs import digits
def get_config():
    config = digits.get_config("smoke")
    config.model.update({"patch_size": 4, "num_blocks": 1})
    config.train.update({"num_steps": 2, "sample_every": 0})
    return config
"""


@pytest.fixture
def command(tmp_path):
    """Starts launch.sweep of tmp_path/recipe.py with the given flags; terminates it if the test fails."""
    module = ["-m", "launch.sweep", f"--config={tmp_path}/recipe.py", f"--workdir={tmp_path}/runs"]
    started = []

    def command(*arguments):
        started.append(commands.start(*module, *arguments))
        return started[-1]

    yield command
    for process in started:
        process.terminate()
        process.communicate()


@pytest.mark.slow
def test_two_runs_stopped_in_the_middle_and_started_again(command, tmp_path):
    recipe_file(tmp_path, "grid({'train.seed': range(2)})", TINY)
    runs = tmp_path / "runs"
    first = command()
    deadline = time.monotonic() + 600
    while not list(runs.glob("*/results.json")):
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.terminate()
    _, err = first.communicate(timeout=60)
    assert (first.returncode, err.splitlines()[-1]) == (75, "stopped: asked to stop; run the same command to continue")
    second = command()
    out, err = second.communicate(timeout=600)
    assert second.returncode == 0, err
    with (runs / "sweep.csv").open(encoding="utf-8") as file:
        found = {int(row["train.seed"]): row[LOSS] for row in csv.DictReader(file)}
    assert list(found) == [0, 1]
    assert len(set(found.values())) == 2
    assert (runs / "sweep.md").read_text() in out
    assert f"--workdir={runs}/train.seed=1" in out
    assert f"--workdir={runs}/train.seed=0" not in out  # it was finished


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(command, tmp_path):
    recipe_file(tmp_path, "grid({'data.source': ['npz:none.npz', 'digits']})", TINY)
    process = command()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "error: failed: data.source=npz_none.npz-" in err.splitlines()[-1]
    assert out.splitlines()[-1].startswith("| digits ")


@pytest.mark.slow
def test_print_shows_the_commands_and_makes_nothing(command, tmp_path):
    recipe_file(tmp_path, "grid({'model.image_size': [(8, 8)], 'train.seed': [3]})", TINY)
    process = command("--executor=print", "--config.train.num_steps=4")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert f"-m launch.train --config={tmp_path}/recipe.py" in out
    assert out.endswith("--config.train.num_steps=4 '--config.model.image_size=(8, 8)' --config.train.seed=3\n")
    assert not (tmp_path / "runs").exists()
