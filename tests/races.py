"""Lets processes compete for the lock of a folder in gs://: exactly one may have it.

python tests/races.py NUM_RACES [NUM_PROCESSES]

In every other race the folder is locked by a process that was killed.
"""

import multiprocessing
import os
import sys

from object_store import BUCKET, Object, ObjectStore


def compete(barrier, races, results):
    """Runs in each process: tries to lock every folder, at the same time as the others."""
    from tarflow_jax import files
    from tarflow_jax.errors import UserError

    files.LEASE_S = 6
    for race in range(races):
        barrier.wait()
        try:
            with files.sole_user(f"gs://{BUCKET}/{race}"):
                barrier.wait()  # until the others have been refused
                results.put((race, True))
        except UserError:
            barrier.wait()
            results.put((race, False))


def main(num_races, num_processes=4):
    """Starts the processes, counts the winners, prints."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(num_processes, timeout=60), context.Queue()
    with ObjectStore() as store:
        os.environ |= store.environment
        for race in range(0, num_races, 2):
            store.objects[f"{race}/lease.json"] = Object(b'{"owner": "a process that was killed"}', 1, 0.0)
        processes = [context.Process(target=compete, args=(barrier, num_races, results)) for _ in range(num_processes)]
        for process in processes:
            process.start()
        winners = [0] * num_races
        for _ in range(num_races * num_processes):
            race, won = results.get(timeout=120)
            winners[race] += won
        for process in processes:
            process.join()
    assert winners == [1] * num_races, winners
    assert not store.objects, sorted(store.objects)
    print(f"{num_races} races of {num_processes} processes: one winner in each")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
