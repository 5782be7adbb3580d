"""Shared by the commands: errors in one line, help, flags that several commands have, joining other processes."""

import ctypes
import difflib
import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from tabulate import tabulate

from launch import end_at_signals, exit_code, on_signals
from tarflow_jax.data import data_folder
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import remove_unfinished, storage_failed
from tarflow_jax.interop import READY_MADE
from tarflow_jax.options import described
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import Preempted, start_processes, use_compilation_cache
from tarflow_jax.sampling import Decoder, GaussSeidelJacobi, Guidance, Jacobi, Sequential, Student
from tarflow_jax.training.loop import NonFiniteError
from tarflow_jax.training.recipe import AUTOENCODER_GROUPS, GROUPS, STUDENT_GROUPS, config_help

EXIT_ERROR = 1
AGAIN = "Start all of them again with the same command"
PATIENCE_S = 10
EXIT_TIMEOUT_S = 7 * 86_400  # the first process may measure a Fréchet distance for hours when the others have ended
# The options of `Guidance` after its weight, in their order.
GUIDANCE_FLAGS = ("guidance_target", "guidance_schedule", "attention_temperature", "guidance_rule", "guidance_blocks")
DECODERS = {"sequential": Sequential(), "jacobi": Jacobi(), "gs_jacobi": GaussSeidelJacobi(8), "student": Student()}

COMPILATION_CACHE = flags.DEFINE_string("compilation_cache", None, 'Folder of compiled programs; "none" for no cache.')
TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the traceback of every error.")
flags.disclaim_key_flags()  # what functions below define are flags of the command that calls them


def run(main: Callable[[Sequence[str]], int | None], *required: str) -> None:
    """Runs a command, whose `required` flags must be given, by app.run.

    An error that the user caused is one line on stderr; any other keeps its traceback.
    """

    def guarded(argv: Sequence[str]) -> int:
        # Orbax, TFDS and gcsfs log every file, JAX every missing platform, the hub's client every request.
        for chatty in ("absl", "fsspec", "gcsfs.credentials", "jax", "httpx", "httpx2"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        for repeating in ("absl", "asyncio", "concurrent.futures"):  # a failed save is logged, then raised
            logging.getLogger(repeating).addFilter(lambda record: not record.exc_info)
        sys.unraisablehook = _ignore_closed_loop
        logging.getLogger("tarflow_jax").setLevel(logging.INFO)
        end_at_signals()
        try:
            if argv[1:]:
                raise UserError(f"unexpected argument {argv[1]!r}; see --help for the flags")
            for name in required:  # not absl's check, which comes before that of the arguments
                if flags.FLAGS[name].value is None:
                    raise UserError(f"--{name} is missing; see --help for the flags")
            cache = COMPILATION_CACHE.value
            if cache != "none" and (cache or not jax.config.jax_compilation_cache_dir):
                use_compilation_cache(Path(cache or data_folder() / "compiled"))
            code = main(argv) or 0
            on_signals(signal.SIG_IGN)  # all is done, and Python removes its handlers before it exits
            return code
        except Preempted as stop:
            print(f"stopped: {stop}", file=sys.stderr)
            return exit_code(stop.signal)
        except Exception as error:
            several = jax.distributed.is_initialized()
            ours = isinstance(error, UserError | OSError | NonFiniteError)
            if isinstance(error, jax.errors.JaxRuntimeError) and several:
                message = f"process {jax.process_index()} of {jax.process_count()}: {one_line(error)}"
                print(f"error: {message}; if another stopped before, its log says why. {AGAIN}", file=sys.stderr)
            elif (ours or storage_failed(error)) and not TRACEBACK.value:
                message = _plain(error) if ours else f"the object store failed ({_plain(error)}); run it again"
                print(f"error: {message}", file=sys.stderr)
            elif several:
                traceback.print_exc()
            else:
                raise
            if several:
                _end_alone(met=not isinstance(error, TimeoutError))
            return EXIT_ERROR

    app.run(guarded, flags_parser=_parse_flags)


def _ignore_closed_loop(event: Any) -> None:
    """Prints an exception that nobody can catch, but not those of TensorStore's callbacks after a save has failed."""
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _end_alone(*, met: bool) -> None:
    """Ends this process, which failed, after at most `PATIENCE_S`: an ordinary exit waits until all others end."""
    if met:
        # If all failed they leave together. Without process 0, JAX would abort the others before they can say why.
        leave = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leave.start()
        leave.join(PATIENCE_S)
    remove_unfinished()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_ERROR)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """Ends a process that JAX aborts, from a thread of its own in which a handler of Python's would not run."""
    remove_unfinished()
    os.write(2, f"error: lost the other processes; the log of the one that failed first says why. {AGAIN}\n".encode())
    os._exit(EXIT_ERROR)


def define_number(name: str, default: float | None, text: str) -> flags.FlagHolder[Any]:
    """Defines a flag for a finite number, which may be left out if `default` is None."""
    holder = flags.DEFINE_float(name, default, text)
    flags.register_validator(name, lambda value: value is None or math.isfinite(value), "expected a finite number")
    return holder


def define_seed(text: str) -> flags.FlagHolder[int]:
    """Defines --seed, which has at most 63 bits in JAX."""
    return flags.DEFINE_integer("seed", 0, text, lower_bound=0, upper_bound=2**63 - 1)


def define_guidance_flags() -> None:
    """Defines the flags of `guidance`."""
    _, *options = described(Guidance)
    for name, (_, default, text) in zip(GUIDANCE_FLAGS, options, strict=True):
        define = flags.DEFINE_float if isinstance(default, float) else flags.DEFINE_string
        define(name, default, text)


def define_decoder_flags() -> None:
    """Defines --decoder and --polish."""
    flags.DEFINE_enum("decoder", "sequential", list(DECODERS), "Block decoder; student: trained by launch.distill.")
    flags.DEFINE_integer("polish", 0, "Fixed-point updates per block that refine a student's images.", lower_bound=0)


def decoder() -> Decoder:
    """Returns the decoder that --decoder and --polish select."""
    name, polish = flags.FLAGS.decoder, flags.FLAGS.polish
    if name == "student":
        return Student(polish)
    if polish:
        raise UserError(f"--polish is {polish}, which is for --decoder=student; leave it out")
    return DECODERS[name]


def draws_clean_images() -> bool:
    """Whether the selected decoder's images need no denoising."""
    return flags.FLAGS.decoder == "student" and not flags.FLAGS.polish


def guidance(weight: float) -> Guidance:
    """Returns the guidance of this weight that the flags of `define_guidance_flags` select."""
    return Guidance(weight, *(flags.FLAGS[name].value for name in GUIDANCE_FLAGS))


def folder(name: str) -> str:
    """Returns the value of a flag that names a folder, or a model on the hub, with `~` expanded."""
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is empty; expected a folder")
    return os.path.expanduser(value)


def define_model_flags() -> None:
    """Defines --workdir, --model, --checkpoint and --memory_bound, which `model_name` and `open_pipeline` read."""
    flags.DEFINE_string("workdir", None, "Run directory, saved model's folder, or hub name.")
    text = f"Ready-made model ({', '.join(READY_MADE)}), saved model's folder, or hub name; instead of --workdir."
    flags.DEFINE_string("model", None, text)
    flags.mark_flags_as_mutual_exclusive(["workdir", "model"])
    flags.DEFINE_enum("checkpoint", "last", ["last", "best"], "Checkpoint of a workdir; best: lowest test loss.")
    define_number("memory_bound", None, "GiB of activations on all devices; default: half of theirs, 2 on CPUs.")


def model_name() -> tuple[str, str]:
    """Returns what --workdir or --model names, and the folder for results: the workdir, or the current one."""
    if flags.FLAGS.workdir is not None:
        return folder("workdir"), folder("workdir")
    if flags.FLAGS.model is None:
        raise UserError("--workdir is missing, or --model; see --help for the flags")
    return folder("model"), "."


def memory_bound() -> int | None:
    """Returns --memory_bound in bytes; None if it is left out."""
    return None if flags.FLAGS.memory_bound is None else int(flags.FLAGS.memory_bound * 2**30)


def open_pipeline(name: str, mesh: jax.sharding.Mesh | None, *, sequences: bool = False) -> TarFlowPipeline:
    """Opens a saved model, or the checkpoint of a workdir that --checkpoint selects; of sequences only where asked."""
    best = flags.FLAGS.checkpoint == "best"
    pipe = TarFlowPipeline.from_pretrained(name, best=best, mesh=mesh, memory_bound=memory_bound())
    if pipe.config.is_sequence and not sequences:
        raise UserError(f"{name} is a flow of sequences; this command is for images")
    return pipe


def define_process_flags() -> None:
    """Defines the flags of `join_processes`."""
    flags.DEFINE_bool("distributed", False, "Run as one of several processes, found by the cluster or the next flags.")
    flags.DEFINE_string("coordinator_address", None, "Address of process 0, HOST:PORT.")
    flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)


def join_processes() -> bool:
    """Connects to the other processes if --distributed was given, and returns whether it was.

    Call it before anything asks for devices. Raises ValueError and TimeoutError as `start_processes`.
    """
    values = flags.FLAGS
    explicit = (values.coordinator_address, values.num_processes, values.process_id)
    if values.distributed:
        start_processes(*explicit, exit_timeout_s=EXIT_TIMEOUT_S)
        ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
    elif any(value is not None for value in explicit):
        raise UserError("--coordinator_address, --num_processes and --process_id mean nothing without --distributed")
    return values.distributed


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags as absl does; an error, in a flag or in a config field, is one line."""
    if asked := {"--help", "-h", "--helpfull"} & set(argv):
        _print_help(full="--helpfull" in asked)
        sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # of a config field; the former holds one of the latter
        cause = error.args[0] if error.args else ""
        name, _, suggestion = str(cause.args[0] if isinstance(cause, KeyError) else cause).partition("\n")
        message = f"unknown config field {name}" + (f". {suggestion}" if suggestion else "")
    except (flags.Error, TypeError, ValueError, OSError, ImportError) as error:
        message = _plain(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_ERROR)


def _print_help(*, full: bool) -> None:
    """Prints a command's docstring and flags; `full`: the options of a recipe, too."""
    print(sys.modules["__main__"].__doc__)
    modules = (name for name in flags.FLAGS.flags_by_module_dict() if name.startswith("launch."))
    print("\n".join(map(flags.FLAGS.module_help, (sys.argv[0], *sorted(modules)))))
    if "config" in flags.FLAGS:
        others = {"distill": STUDENT_GROUPS, "train_autoencoder": AUTOENCODER_GROUPS}
        groups = others.get(Path(sys.argv[0]).stem, GROUPS)
        print("\n" + (config_help(groups) if full else "--helpfull lists the options of a recipe."))


def _plain(error: Exception) -> str:
    """Returns an error's message in one line; from ml_collections' traceback of a recipe, only the recipe's error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rpartition("Error: ")[2] if "Error whilst parsing config file" in text else text


def example_labels(num_classes: int, count: int) -> np.ndarray | None:
    """Returns labels 0, 1, 2, … in a cycle, int32 [count]; None for an unconditional model."""
    return np.arange(count, dtype=np.int32) % num_classes if num_classes else None


def whole_number(name: str, text: str) -> int:
    """Parses an item of a flag's list; a UserError names the flag."""
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--{name} has {text!r}; expected whole numbers") from None


def class_number(text: str, names: Sequence[str], flag: str = "labels") -> int:
    """Returns the number of a class from its number, -1 for none, or from its name, in upper or lower case.

    Raises UserError, which suggests the nearest name.
    """
    folded = [name.casefold() for name in names]
    if text in names:
        return list(names).index(text)
    if folded.count(text.casefold()) == 1:
        return folded.index(text.casefold())
    if not names or text.lstrip("-").isdigit():
        return whole_number(flag, text)
    hint = f"expected a number or one of {', '.join(names)}"
    if nearest := difflib.get_close_matches(text.casefold(), folded, n=1):
        hint = f"did you mean {names[folded.index(nearest[0])]!r}?"
    raise UserError(f"--{flag} has {text!r}; {hint}")


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with one row a mapping, columns in the order they first appear, and floats to 5 digits."""
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".5g")
