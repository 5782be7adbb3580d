"""The commands: `python -m launch.NAME`.

From its first import on, a command exits at once on SIGTERM, SIGINT or SIGHUP and leaves no file half-written. Only
training finishes its step and saves first (`runtime.PreemptionGuard`).
"""

import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


def exit_code(number: int) -> int:
    """Returns the exit code of a command that a signal stopped: 75 for SIGTERM, 130 for SIGINT, 129 for SIGHUP."""
    return EXIT_PREEMPTED if number == signal.SIGTERM else 128 + number


def end_at_signals() -> None:
    """Installs the signal handlers. All commands but training call it again once JAX has replaced that of SIGTERM."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, _end)


def ignore_signals() -> None:
    """Ignores signals for the rest of the process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    # No exception: one raised in a callback is lost, and C++ threads may outlive the interpreter.
    if files := sys.modules.get("tarflow_jax.files"):
        files.remove_unfinished()
    os.write(2, b"stopped: asked to stop; run the same command again\n")
    os._exit(exit_code(number))


def show_help(arguments: list[str]) -> None:
    """Ends the process with --help or --helpfull if it was asked for; to be called once all flags are defined."""
    asked = {"--help", "-h", "--helpfull"} & set(arguments)
    if not asked:
        return
    from absl import flags

    from tarflow_jax.training.recipe import GROUPS, STUDENT_GROUPS, config_help

    print(sys.modules["__main__"].__doc__)
    modules = (name for name in flags.FLAGS.flags_by_module_dict() if name.startswith("launch."))
    print("\n".join(map(flags.FLAGS.module_help, (sys.argv[0], *sorted(modules)))))
    if "config" in flags.FLAGS:
        groups = STUDENT_GROUPS if sys.argv[0].endswith("distill.py") else GROUPS
        print("\n" + (config_help(groups) if "--helpfull" in asked else "--helpfull lists the options of a recipe."))
    sys.exit(0)


if sys.argv[0] == "-m":  # as `python -m` has it while it looks for the command; others may import this package
    end_at_signals()
