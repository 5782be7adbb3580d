"""Ends a training run in gs:// while it talks to the store, and checks that it ends with the same parameters.

python tests/object_store_kills.py FOLDER NUM_KILLS [SEED]

Each run is ended with SIGKILL or SIGTERM as the store receives a random request, before or after it does what it is
asked. The store is that of object_store.py.
"""

import collections
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from etils import epath

import kill
from object_store import BUCKET, ObjectStore

REQUESTS = 250  # of a run of two saves


def end_at_a_request(store, child, number, target, fault):
    """Has the store send a signal to a run at its `target`-th request."""
    first, sent = len(store.requests), []

    def fault_at(request):
        if request.number == first + target:
            sent.append(request.name)
            os.kill(child, number)
            return fault if number == signal.SIGKILL else None
        return None

    store.fault = fault_at
    _, status = os.waitpid(child, 0)
    store.fault = lambda request: None
    return sent[0] if sent else None, status


def digest(store, name, num_steps):
    """The result of a run that goes on to its end."""
    _, status = os.waitpid(kill.attempt(epath.Path(f"gs://{BUCKET}/{name}"), num_steps), 0)
    assert status == 0, f"the run ended with status {status}"
    return store.objects[f"{name}/digest"].content


def main(folder, num_kills, seed=0):
    """Runs, kills, compares, prints."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    rng, where = np.random.default_rng(seed), collections.Counter()
    num_steps = 2 * kill.STEPS_A_KILL * (num_kills + 1)
    with ObjectStore() as store:
        os.environ |= store.environment
        for i in range(num_kills):
            number = signal.SIGTERM if i % 3 == 2 else signal.SIGKILL
            child = kill.attempt(epath.Path(f"gs://{BUCKET}/killed"), num_steps)
            name, status = end_at_a_request(
                store, child, number, rng.integers(1, REQUESTS), rng.choice(["cut", "lost"])
            )
            if name is None:
                assert status == 0, f"the run ended with status {status} before it was killed"
                break
            where[f"{number.name} at {name.removeprefix('killed/').split('/')[0] or 'the bucket'}"] += 1
        killed = digest(store, "killed", num_steps)
        assert killed == digest(store, "whole", num_steps), "the parameters differ"
    found = ", ".join(f"{count} by {what}" for what, count in sorted(where.items()))
    print(f"{where.total()} runs ended ({found}); the same parameters, bit for bit")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
