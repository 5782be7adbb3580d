"""What the commands share: one-line errors, flags of several commands, start-up of several processes."""

import ast
import contextlib
import difflib
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import app, flags

from launch import end_at_signals, exit_code, ignore_signals, show_help
from tarflow_jax.arguments import check_polish
from tarflow_jax.data import default_data_dir
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import Preempted, start_processes
from tarflow_jax.runtime.programs import use_compilation_cache
from tarflow_jax.sampling import GaussSeidelJacobi, Guidance, Jacobi, Sequential
from tarflow_jax.sampling.guidance import RULES, SCHEDULES, TARGETS
from tarflow_jax.training.loop import NonFiniteError

EXIT_ERROR = 1
GUIDANCE_FLAGS = (
    "guidance_target",
    "guidance_schedule",
    "attention_temperature",
    "guidance_rule",
    "guidance_blocks",
)

DECODERS = {
    "sequential": Sequential(),
    "jacobi": Jacobi(),
    "gs_jacobi": GaussSeidelJacobi(num_segments=8),
    "auto": "auto",
    "student": "student",
}


COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Keep compiled programs in this folder, not beside the data sets; none: nowhere.",
)
TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error came from, not only what it says.")
flags.disclaim_key_flags()  # what functions below define are flags of the command that calls them


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """app.run, with one line on stderr instead of a traceback for errors of the user's making.

    Any other exception is a fault of ours and keeps its traceback.
    """

    def guarded(argv: Sequence[str]) -> int:
        for chatty in ("absl", "jax"):  # Orbax and TFDS tell of every file, JAX of every absent platform
            logging.getLogger(chatty).setLevel(logging.WARNING)
        logging.getLogger("tarflow_jax").setLevel(logging.INFO)
        end_at_signals()
        try:
            _keep_compiled_programs(flags.FLAGS.compilation_cache)
            if argv[1:]:
                raise UserError(f"unexpected argument {argv[1]!r}; see --help for the flags")
            code = main(argv) or 0
            ignore_signals()  # all is done, and Python would take its handlers away before it ends
            return code
        except Preempted as stop:
            print(f"stopped: {stop}", file=sys.stderr)
            return exit_code(stop.signal)
        except (UserError, OSError, NonFiniteError) as error:
            if TRACEBACK.value:
                raise
            print(f"error: {_plain(error)}", file=sys.stderr)
            return EXIT_ERROR
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            _leave_the_others(error)

    app.run(guarded, flags_parser=_parse_flags)


def _keep_compiled_programs(folder: str | None) -> None:
    given = jax.config.jax_compilation_cache_dir  # by JAX_COMPILATION_CACHE_DIR
    if folder != "none" and (folder or not given):
        use_compilation_cache(Path(folder or default_data_dir() / "compiled"))


def _leave_the_others(error: jax.errors.JaxRuntimeError) -> NoReturn:
    """Ends one of several processes; an ordinary exit would wait a minute for those that may be dead."""
    print(
        f"error: process {jax.process_index()} of {jax.process_count()}: {one_line(error)}; if another stopped before, "
        "its log says why. Start all again with the same command",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_ERROR)


def define_number(name: str, default: float, text: str) -> flags.FlagHolder[float]:
    """A flag of a finite number."""
    holder = flags.DEFINE_float(name, default, text)
    flags.register_validator(name, math.isfinite, "expected a finite number")
    return holder


def define_seed(text: str) -> flags.FlagHolder[int]:
    """--seed, which JAX takes up to 63 bits."""
    return flags.DEFINE_integer("seed", 0, text, lower_bound=0, upper_bound=2**63 - 1)


def define_guidance_flags() -> None:
    """What beside its weight makes up a `Guidance`, for the commands that draw."""
    flags.DEFINE_enum("guidance_target", "both", TARGETS, "Guide these affine parameters.")
    flags.DEFINE_enum(
        "guidance_schedule", "linear", SCHEDULES, "Let the weight grow along the tokens, or be the same for all."
    )
    define_number("attention_temperature", 1.0, "Divide the attention logits of the unguided pass by τ.")
    flags.DEFINE_enum("guidance_rule", "log_scale", RULES, "Guide log-scales or scales, or multiply densities.")
    flags.DEFINE_string("guidance_blocks", "all", "Guide all blocks, or this many, counted from the noise.")


def define_decoder_flags() -> None:
    """--decoder and --polish, for the commands that draw."""
    flags.DEFINE_enum(
        "decoder",
        "sequential",
        list(DECODERS),
        "Invert blocks this way; auto: tune_decoder's, student: launch.distill's.",
    )
    flags.DEFINE_integer(
        "polish", 0, "Bring a student's images nearer to the inverse by this many updates of a block.", lower_bound=0
    )


def decoder() -> dict[str, Any]:
    """What --decoder and --polish say, as `pipe.decode` takes it."""
    values = flags.FLAGS
    check_polish(values.polish, values.decoder)
    return {"decoder": DECODERS[values.decoder], "polish": values.polish}


def draws_clean_images() -> bool:
    """Whether the decoder is one whose images are not to be denoised."""
    return flags.FLAGS.decoder == "student" and not flags.FLAGS.polish


def guidance(weight: float) -> Guidance:
    """Of this weight, the rest by `define_guidance_flags`."""
    return Guidance(weight, *(flags.FLAGS[name].value for name in GUIDANCE_FLAGS))


def folder(name: str) -> str:
    """The folder that a flag names, `~` being the home folder; a name on the hub stays what it is."""
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is empty; expected a folder")
    return os.path.expanduser(value)


def define_checkpoint_flag() -> None:
    """--checkpoint, for the commands that open a workdir."""
    flags.DEFINE_enum(
        "checkpoint",
        "last",
        ["last", "best"],
        "Open this checkpoint of a workdir; best has the lowest test loss.",
    )


def open_pipeline(name: str, mesh: jax.sharding.Mesh | None) -> TarFlowPipeline:
    """The model of a workdir, by the checkpoint that --checkpoint names, or a saved one."""
    return TarFlowPipeline.from_pretrained(name, best=flags.FLAGS.checkpoint == "best", mesh=mesh)


def define_process_flags() -> None:
    """--distributed and its companions, for the commands that several processes run together."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "Be one of several processes, which the cluster names, or else the next three flags.",
    )
    flags.DEFINE_string("coordinator_address", None, "Meet the other processes at HOST:PORT, process 0's.")
    flags.DEFINE_integer("num_processes", None, "Wait for this many processes.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Be this process, counted from 0.", lower_bound=0)


def join_processes() -> bool:
    """Meets the other processes if --distributed; to be called before anything asks for devices.

    Returns:
      Whether --distributed was given.

    Raises:
      ValueError, TimeoutError: as `start_processes`.
    """
    values = flags.FLAGS
    explicit = (values.coordinator_address, values.num_processes, values.process_id)
    if values.distributed:
        start_processes(*explicit)
    elif any(value is not None for value in explicit):
        raise UserError("--coordinator_address, --num_processes and --process_id mean nothing without --distributed")
    return values.distributed


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser; a config field that does not exist is an error of one line, with a suggestion."""
    show_help(argv[1:])
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        message = _unknown_flag(error.flagname)
    except (AttributeError, KeyError) as error:
        message = _unknown_field(error)
    except (flags.Error, TypeError, ValueError, OSError, ImportError) as error:
        message = _plain(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_ERROR)


def _unknown_flag(name: str) -> str:
    """Suggests the nearest of the command's own flags, not of those that absl brings along."""
    modules = flags.FLAGS.flags_by_module_dict()
    ours = [flag.name for module, found in modules.items() if not module.startswith("absl.") for flag in found]
    nearest = difflib.get_close_matches(name, ours, n=1)
    return f"unknown flag --{name}; " + (f"did you mean --{nearest[0]}?" if nearest else "see --help for the flags")


def _plain(error: Exception) -> str:
    """A message in one line; of a recipe that raises, its own error, of which ml_collections tells the traceback."""
    text = " ".join(str(error).split())
    return text.rpartition("Error: ")[2] if "Error whilst parsing config file" in text else text


def _unknown_field(error: Exception) -> str:
    """ml_collections wraps the name, and its suggestion on a second line, in one or two layers of quotes."""
    text = str(error.args[0] if error.args else error)
    with contextlib.suppress(SyntaxError):
        text = str(ast.literal_eval(text))
    name, _, suggestion = text.replace("'", "").partition("\n")
    return f"unknown config field {name!r}" + (f". {suggestion}" if suggestion else "")


def example_labels(num_classes: int, count: int) -> np.ndarray | None:
    """0, 1, 2, … over and over; None for an unconditional model."""
    return np.arange(count, dtype=np.int32) % num_classes if num_classes else None


def whole_number(name: str, text: str) -> int:
    """Parses a flag's item; raises ValueError naming the flag."""
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--{name} has {text!r}; expected whole numbers") from None


def class_number(text: str, names: Sequence[str], flag: str = "labels") -> int:
    """A class by its number, or by its name, in any case, where the data set has names; -1 is no class.

    Raises:
      ValueError: neither; says what the flag has, and the nearest name.
    """
    folded = [name.casefold() for name in names]
    if text in names:
        return list(names).index(text)
    if folded.count(text.casefold()) == 1:
        return folded.index(text.casefold())
    if not names or text.lstrip("-").isdigit():
        return whole_number(flag, text)
    nearest = difflib.get_close_matches(text.casefold(), folded, n=1)
    known = f"expected a number or one of {', '.join(names)}"
    hint = f"did you mean {names[folded.index(nearest[0])]!r}?" if nearest else known
    raise UserError(f"--{flag} has {text!r}; {hint}")
