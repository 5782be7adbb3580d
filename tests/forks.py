"""Runs programs as `python -m NAME` and `python -c CODE` would, each forked from a process that has its imports.

Reads a line of JSON for each program from stdin, and prints its exit code once it has ended.
"""

import gc
import json
import os
import runpy
import signal
import sys
import types
import warnings

import tarflow_jax.evaluation.classification
import tarflow_jax.evaluation.distances
import tarflow_jax.evaluation.generation
import tarflow_jax.text_to_image
import tarflow_jax.training  # noqa: F401

TIMEOUT_S = 240


def serve():
    """Forks for every request; returns the request in the child, None in the parent when there are no more."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def become(kind, program, arguments, cwd, environment, outputs):
    """Takes over the environment, the folder and the output files of a program, and runs it."""
    signal.alarm(TIMEOUT_S)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.path[0] = cwd
    sys.argv = ["-c", *arguments]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(program, sys.modules["__main__"].__dict__)


warnings.filterwarnings("ignore", ".*fork")
gc.freeze()
if request := serve():
    become(*request)
