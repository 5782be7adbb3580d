"""How tests start programs: as where only requirements.txt is installed.

They share what they compile (see conftest.py), and hardly optimise it.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Programs run for milliseconds and are compiled for seconds, a quarter of them in XLA's newer emitters of loops.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
NOT_OPTIMISED = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # a program runs a few times
COMMANDS = tuple(
    sorted(path.stem for path in ROOT.joinpath("launch").glob("*.py") if '__name__ == "__main__"' in path.read_text())
)


def environment(**variables):
    """This process's environment, with none of its devices: programs have as many as they ask for."""
    path = os.pathsep.join([str(Path(__file__).with_name("without_torch")), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "XLA_FLAGS": QUICK_TO_COMPILE} | variables


def start(*arguments, cwd=ROOT, **variables):
    """`python ARGUMENTS` under way, its output in pipes; `variables` are added to its environment."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment(**variables), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments, **options):
    """(exit code, stdout, stderr) of `python ARGUMENTS`."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err
