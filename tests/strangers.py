"""Makes mistakes with the commands and prints their messages as the table in docs/robustness.md.

python tests/strangers.py [FOLDER]

FOLDER, a temporary one by default, gets a run of two steps, a saved model and a folder of images.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import commands

TRAIN = "launch.train --config=configs/digits.py:smoke --workdir={new}"
SAMPLE = "launch.sample --workdir={run}"
EVALUATE = "launch.evaluate --workdir={run}"
MISTAKES = (
    "launch.train --config=configs/digits.py:huge --workdir={new}",
    "launch.train --config=configs/none.py --workdir={new}",
    "launch.train --config=configs/digits.py:smoke --workdir=",
    "launch.train --config=configs/digits.py:smoke --workdir={model}",
    f"{TRAIN} --config.train.num_step=5",
    f"{TRAIN} --config.model.image_size=16",
    f"{TRAIN} --config.model.attention=cudnn",
    f"{TRAIN} --config.optimizer.beta1=2",
    f"{TRAIN} --config.optimizer.learning_rate=nan",
    f"{TRAIN} --config.model.num_classes=0 --config.sample.guidance.weight=1.0",
    f"{TRAIN} --config.data.source=folder:{{images}} --config.model.image_channels=3",
    f"{TRAIN} --config.data.source=folder:{{folder}}/nothing",
    "launch.train --config=configs/digits.py:smoke --workdir={run} --config.noise.std=0.3",
    f"{SAMPLE} --guidance=nan",
    f"{SAMPLE} --labels=3,ten",
    f"{SAMPLE} --seed=18446744073709551616",
    f"{SAMPLE} --guidence=1",
    "launch.sample --workdir={folder}/nothing",
    f"{EVALUATE} --metrics=fid --num_samples=100",
    f"{EVALUATE} --metrics=bits_per_dim",
    f"{EVALUATE} --metrics=fidd",
    "launch.evaluate --workdir={model} --metrics=classification",
    "launch.convert --from_torch={images}/a/0.png --image_size=8 --patch_size=2 --out={new}",
)


def prepare(folder: Path) -> dict[str, Path]:
    """Makes the files that the mistakes name, and returns their paths."""
    names = {name: folder / name for name in ("run", "new", "model", "images")} | {"folder": folder}
    for i, name in enumerate("ab"):
        (names["images"] / name).mkdir(parents=True, exist_ok=True)
        for k in range(12):
            pixels = np.random.default_rng(100 * i + k).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(names["images"] / name / f"{k}.png")
    (names["images"] / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    fields = ("--config.train.num_steps=2", "--config.train.sample_every=0")
    code, _, err = commands.run(
        "-m", "launch.train", "--config=configs/digits.py:smoke", f"--workdir={names['run']}", *fields
    )
    assert code == 0, err
    save = (
        "import sys; from tarflow_jax import TarFlowPipeline; "
        "TarFlowPipeline.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    code, _, err = commands.run("-c", save, names["run"], names["model"])
    assert code == 0, err
    return names


def main() -> None:
    """Prints the table; exits with 1 if a command showed a traceback, had another exit code, or no error line."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(tempfile.mkdtemp())
    names, failed = prepare(folder.resolve()), False
    print("| command | exit code | last line |\n|---|---|---|")
    for mistake in MISTAKES:
        code, out, err = commands.run("-m", *(word.format(**names) for word in mistake.split()))
        last = (err.strip() or out.strip() or " ").splitlines()[-1].replace(str(names["folder"]), "DIR")
        failed |= code != 1 or "Traceback" in err or not last.startswith("error: ")
        shown = mistake.replace("{folder}/", "DIR/").replace("{", "DIR/").replace("}", "")
        print(f"| `{shown}` | {code} | {last.replace('|', '/')} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    try:
        main()
    except subprocess.TimeoutExpired as error:
        sys.exit(f"{error.cmd} did not end")
