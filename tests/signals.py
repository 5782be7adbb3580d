"""Sends signals to commands at random times: each must exit with one line, and a rerun give the same results.

python tests/signals.py FOLDER [TRIES_OF_EACH_SIGNAL] [SEED]
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

import commands

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGHUP: 129}
FIELDS = ("--config.train.num_steps=600", "--config.train.checkpoint_every=50", "--config.train.sample_every=0")


def arguments(name, folder):
    """Returns a command that writes to `folder`."""
    model = f"--workdir={folder.parent / 'model'}"
    return {
        "train": ("launch.train", "--config=configs/digits.py:smoke", f"--workdir={folder / 'run'}", *FIELDS),
        "sample": ("launch.sample", model, "--num_images=64", f"--out={folder / 'samples'}"),
        "evaluate": ("launch.evaluate", model, "--metrics=kid", "--num_samples=1000", f"--out={folder / 'out'}"),
        "prepare": (
            "launch.prepare_data", f"--data=folder:{folder.parent / 'images'}", "--image_size=8",
            "--preprocessing=tarflow", f"--data_dir={folder / 'data'}",
        ),
    }[name]  # fmt: skip


def run(name, folder, number=None, delay=0.0):
    """Runs a command, sends it a signal after `delay` seconds; returns what was wrong with its exit, or None."""
    environment = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"), "TARFLOW_DATA_DIR": str(folder.parent)}
    process = commands.start("-m", *arguments(name, folder), **environment)
    if number is not None:
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
    out, err = process.communicate(timeout=300)
    expected = {0} if number is None else {0, CODES[number]}  # 0: it had finished before the signal
    words = [word for word in ("Traceback", "Segmentation", "Fatal", "Exception ignored") if word in err]
    if process.returncode in expected and not words:
        return None
    return f"{name}, {number!r} after {delay:.2f} s: exit code {process.returncode}\n{out}{err}"


def digest(name, folder):
    """Hashes the results of a command."""
    if name == "train":
        program = (
            "import sys; from tarflow_jax import TarFlowPipeline; from tarflow_jax.fingerprint import fingerprint; "
            "print(fingerprint(TarFlowPipeline.from_pretrained(sys.argv[1]).variables))"
        )
        code, out, err = commands.run("-c", program, folder / "run")
        assert code == 0, err
        return out
    patterns = {
        "sample": "samples/samples.npz",
        "evaluate": "out/samples/*/chunk_*.npz",
        "prepare": "data/**/*.array_record",
    }
    found = hashlib.sha256()
    for path in sorted(folder.glob(patterns[name])):
        found.update(path.read_bytes())
    return found.hexdigest()


def prepare(folder):
    """Makes a model to sample from, and images to pack."""
    for i in range(400):
        path = folder / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    fields = ("--config.train.num_steps=2", "--config.train.sample_every=0")
    code, _, err = commands.run(
        "-m", "launch.train", "--config=configs/digits.py:smoke", f"--workdir={folder / 'model'}", *fields
    )
    assert code == 0, err


def disturb(name, folder, tries, rng):
    """Interrupts a command `tries` times by every signal, in random order, then lets it finish; returns problems."""
    begin = time.monotonic()
    problems = [run(name, folder / "whole")]
    seconds = time.monotonic() - begin
    for number in rng.permutation(np.repeat([int(n) for n in CODES], tries)):
        problems.append(run(name, folder / "disturbed", signal.Signals(number), rng.uniform(0.05, 1.1 * seconds)))
    problems.append(run(name, folder / "disturbed"))
    if digest(name, folder / "whole") != digest(name, folder / "disturbed"):
        problems.append(f"{name}: the result is not that of an undisturbed run")
    return [problem for problem in problems if problem]


def main(folder, tries=50, seed=0):
    """Interrupts every command, two at a time, and prints problems."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    names = ("train", "sample", "evaluate", "prepare")
    for name in names:  # they share the model and the images
        (folder / name).mkdir()
        for shared in ("model", "images", "compiled"):
            (folder / shared).mkdir(exist_ok=True)
            os.symlink(folder / shared, folder / name / shared)
    shares = [tries // 4 + (i < tries % 4) for i in range(4)]
    with ThreadPoolExecutor(2) as pool:
        rngs = [np.random.default_rng((seed, i)) for i in range(4)]
        found = list(pool.map(disturb, names, [folder / name for name in names], shares, rngs))
    problems = [problem for of_command in found for problem in of_command]
    done = f"{tries} of each of SIGINT, SIGTERM and SIGHUP: one line each, and the same results"
    print("\n\n".join(problems) or done)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:]))
