"""Starts programs for tests, as if only requirements.txt were installed.

They share the tests' compilation cache (see conftest.py) and compile with few optimisations.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Tests' programs run for milliseconds but compile for seconds; .ci/run also tests programs that are optimised.
NOT_OPTIMISED = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
COMMANDS = tuple(
    sorted(path.stem for path in ROOT.joinpath("launch").glob("*.py") if '__name__ == "__main__"' in path.read_text())
)


def environment(**variables):
    """Returns this process's environment without its eight CPU devices."""
    path = os.pathsep.join([str(Path(__file__).with_name("without_torch")), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "XLA_FLAGS": NOT_OPTIMISED} | variables


def start(*arguments, cwd=ROOT, **variables):
    """Starts `python ARGUMENTS` with its output in pipes and `variables` added to its environment."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment(**variables), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments, **options):
    """Runs `python ARGUMENTS`; returns (exit code, stdout, stderr)."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err
