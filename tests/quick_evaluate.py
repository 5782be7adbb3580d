"""launch.evaluate, but with a classifier that learns in seconds: for tests of the command itself."""

import runpy

from tarflow_jax.evaluation import classifier

if __name__ == "__main__":
    classifier.MIN_STEPS = 20
    runpy.run_module("launch.evaluate", run_name="__main__", alter_sys=True)
