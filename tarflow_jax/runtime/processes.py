"""Joins several processes into one program, before JAX initialises its devices."""

import re
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
      timeout_s: seconds to wait for the others.
      exit_timeout_s: seconds that a process waits at its exit for the others to end; then JAX aborts all.

    Raises:
      ValueError: no cluster that JAX knows, only some of the arguments, or an invalid one.
      TimeoutError: not all processes joined in time.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(value is not None for value in given):
        _check(*given)
    failure: list[Exception] = []

    def join() -> None:
        try:
            # JAX aborts the process at its own time-out, so ours comes first.
            jax.distributed.initialize(
                *given, initialization_timeout=int(timeout_s) + 60, shutdown_timeout_seconds=exit_timeout_s
            )
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        who = "process 0" if not process_id else f"process {process_id}"
        raise TimeoutError(
            f"not all of {num_processes or 'the'} processes met at {coordinator_address or 'the coordinator'} within "
            f"{timeout_s:g} s (this is {who}); start them all, with the same address, which all can reach"
        )
    if failure:
        reason = f"could not start at {coordinator_address}: {one_line(failure[0])}"
        if coordinator_address is None:
            reason = (
                f"the cluster does not say which processes take part ({one_line(failure[0])}); on Cloud TPU, SLURM "
                "(in srun), GKE and Open MPI it does, elsewhere give coordinator_address, num_processes and process_id"
            )
        raise UserError(reason) from failure[0]


def _check(address: str | None, count: int | None, index: int | None) -> None:
    if address is None or count is None or index is None:
        raise UserError("coordinator_address, num_processes and process_id go together; give all three or none")
    if not re.fullmatch(r"\S+:\d+", address):
        raise UserError(f"coordinator_address is {address!r}; expected HOST:PORT of process 0")
    if not 0 <= index < count:
        raise UserError(f"process_id is {index}; expected 0 to num_processes - 1, which is {count - 1}")
