"""Joins several processes into one program, before JAX initialises its devices."""

import threading

import jax

from tarflow_jax.errors import UserError, one_line

TIMEOUT_S = 300  # nodes of a cluster come up minutes apart


def start_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    exit_timeout_s: int = TIMEOUT_S,
) -> None:
    """Joins this process with all others of the run. CPUs communicate through gloo.

    Without arguments, the cluster provides them: Cloud TPU, SLURM (in srun), GKE or Open MPI.

    Args:
      coordinator_address: HOST:PORT of process 0, a free port that all can reach.
      num_processes: total number.
      process_id: index of this process, counted from 0.
      timeout_s: seconds to wait for the others; raises TimeoutError after them.
      exit_timeout_s: seconds that a process waits at its exit for the others to end; then JAX aborts all.

    Raises UserError for no cluster that JAX knows, only some of the arguments, or an invalid one.
    """
    if coordinator_address and ":" not in coordinator_address:
        raise UserError(f"coordinator_address is {coordinator_address!r}; expected HOST:PORT of process 0")
    failure: list[Exception] = []

    def join() -> None:
        try:
            # JAX aborts the process at its own time-out, so ours comes first.
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                initialization_timeout=int(timeout_s) + 60,
                shutdown_timeout_seconds=exit_timeout_s,
            )
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise TimeoutError(
            f"not all of {num_processes or 'the'} processes met at {coordinator_address or 'the coordinator'} within "
            f"{timeout_s:g} s (this is process {process_id or 0}); start them all, with an address that all can reach"
        )
    if failure and coordinator_address:
        raise UserError(f"could not start at {coordinator_address}: {one_line(failure[0])}") from failure[0]
    if failure:
        raise UserError(
            f"the cluster does not say which processes take part ({one_line(failure[0])}); on Cloud TPU, SLURM (in "
            "srun), GKE and Open MPI it does, elsewhere give coordinator_address, num_processes and process_id"
        ) from failure[0]
