"""The smallest part of benchmarks/rehearsal.py: one cell of its matrix."""

import json
import subprocess
import sys

import pytest

from commands import ROOT, environment

pytestmark = pytest.mark.slow


def rehearse(tmp_path, *arguments):
    """The rows that the benchmark writes."""
    command = ("-m", "benchmarks.rehearsal", *arguments, f"--folder={tmp_path}", f"--rows={tmp_path / 'rows.jsonl'}")
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(), check=True, timeout=900)
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def test_training_on_two_processes_of_two_devices_is_that_of_one(tmp_path):
    one, two = rehearse(tmp_path, "matrix", "--commands=train", "--meshes=fsdp", "--processes=2")
    assert (one["processes"], two["processes"]) == ("1 x 4", "2 x 2")
    assert two["losses"] < 1e-6
    assert max(two["images"], two["parameters"]) < 1e-4
