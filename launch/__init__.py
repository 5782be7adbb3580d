"""The commands: `python -m launch.NAME`.

A signal ends a command at once and leaves no file half-written, from its first import on; only training finishes its
step and saves first (`runtime.PreemptionGuard`).
"""

import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EXIT_PREEMPTED = 75  # "try again later" (sysexits.h), for SIGTERM: the same command continues


def exit_code(number: int) -> int:
    """What a command stopped by a signal exits with: 75 for SIGTERM, 130 for SIGINT, 129 for SIGHUP."""
    return EXIT_PREEMPTED if number == signal.SIGTERM else 128 + number


def end_at_signals() -> None:
    """To be called again where JAX has taken SIGTERM for itself (`common.join_processes`), but for training."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, _end)


def ignore_signals() -> None:
    """From here to the end of the process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    # Not an exception: those raised in a callback are lost, and C++ threads may outlive the interpreter's end.
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
