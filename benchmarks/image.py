"""Runs the steps of launch/Dockerfile without Docker, in a new environment and folder, and trains there.

    python -m benchmarks.image [JAX=tpu]          # or JAX=cuda12; some minutes, most of them pip's

COPY takes committed files only. Trains configs/digits.py:smoke on this machine's CPU.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILE = Path("launch/Dockerfile")
TRAIN = ("launch.train", "--config=configs/digits.py:smoke", "--workdir=runs/digits")


def main(argv: list[str]) -> None:
    """Builds, trains, prints each step with its seconds."""
    lines = FILE.read_text().replace("\\\n", " ").splitlines()
    arguments, entry = dict(argument.split("=") for argument in argv[1:]), ()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run(["python3.11", "-m", "venv", folder / "environment"], check=True)
        environment = os.environ | {"PATH": f"{folder}/environment/bin:/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}

        def run(step: str, command: list[str] | str) -> None:
            start = time.perf_counter()
            subprocess.run(command, cwd=folder, env=environment, check=True, shell=isinstance(command, str))
            print(f"ok, {time.perf_counter() - start:.0f} s: {step}", flush=True)

        for line in lines:
            instruction, _, rest = line.partition(" ")
            if instruction == "ARG":
                name, _, default = rest.partition("=")
                environment[name] = arguments.get(name, default)
            elif instruction == "ENV":
                environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
            elif instruction == "WORKDIR":
                folder = Path(temporary) / rest.lstrip("/")
                folder.mkdir()
            elif instruction == "COPY":
                *sources, target = rest.split()
                assert [target] in (["."], sources), line  # under their own names
                archive = subprocess.run(["git", "archive", "HEAD", *sources], check=True, capture_output=True).stdout
                subprocess.run(["tar", "-x"], input=archive, cwd=folder, check=True)
                print(f"ok: {line}")
            elif instruction == "RUN":
                run(line, rest)
            elif instruction == "ENTRYPOINT":
                entry = json.loads(rest)
            elif instruction == "CMD":
                run(line, [*entry, *json.loads(rest)])
        run(f"train, {TRAIN}", [*entry, *TRAIN])


if __name__ == "__main__":
    main(sys.argv)
