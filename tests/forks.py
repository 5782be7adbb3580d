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


def become(request):
    """Takes over the environment, the folder and the output files of a program."""
    signal.alarm(TIMEOUT_S)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    files = ((os.devnull, os.O_RDONLY), (request["out"], os.O_WRONLY), (request["err"], os.O_WRONLY))
    for number, (path, mode) in enumerate(files):
        os.dup2(os.open(path, mode), number)
    sys.path[0] = request["cwd"]
    sys.argv = ["-c", *request["arguments"]]


warnings.filterwarnings("ignore", ".*fork")
gc.freeze()
if (request := serve()) is not None:
    become(request)
    if request["kind"] == "-m":
        runpy.run_module(request["program"], run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(request["program"], sys.modules["__main__"].__dict__)
