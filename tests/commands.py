"""Starts programs for tests, as if only requirements.txt were installed.

They share the tests' compilation cache (see conftest.py) and compile with few optimisations.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Tests' programs run for milliseconds but compile for seconds; .ci/run also tests programs that are optimised.
NOT_OPTIMISED = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
COMPILED = Path("~/.cache/tarflow_jax/compiled_by_tests").expanduser()
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


FREE = {"cwd", "TARFLOW_DATA_DIR", "XLA_FLAGS"}  # read by no module as it is imported


def run(*arguments, **options):
    """Runs `python ARGUMENTS`; returns (exit code, stdout, stderr)."""
    if arguments[0] in ("-m", "-c") and not options.keys() - FREE:
        return _run_forked(*map(str, arguments), **options)
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@functools.cache
def _server():
    """The process that forks."""
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "forks.py")], cwd=ROOT, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def _run_forked(kind, program, *arguments, cwd=ROOT, **variables):
    """Runs a program without the seconds of its imports."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        request = (kind, program, arguments, str(cwd), environment(**variables), list(map(str, files)))
        print(json.dumps(request), file=server.stdin, flush=True)
        return int(server.stdout.readline()), *(file.read_text() for file in files)
