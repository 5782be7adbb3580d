"""Makes mistakes with the commands and in Python, and prints tables of the mistakes and their messages.

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
    "launch.sample {run}",
    "launch.sample {run} --num_images=4",
    f"{SAMPLE} --num_images 4 64",
    "launch.sample",
    "launch.sample --workdir",
    "launch.train --workdir={new}",
    "launch.train --config=configs/digits.py:smoke",
    "launch.evaluate {run}",
    "launch.evaluate --metrics=fid",
    "launch.prepare_data digits",
    "launch.convert {images}/a/0.png {new}",
    f"{SAMPLE} --num_images=four",
    f"{SAMPLE} --num_images=0",
    f"{SAMPLE} --guidance=1 --guidance_blocks=99",
    f"{SAMPLE} --guidance=1 --guidance_rule=best",
    f"{SAMPLE} --guidance=1 --attention_temperature=0",
    f"{SAMPLE} --decoder=student",
    f"{SAMPLE} --decoder=fast",
    f"{SAMPLE} --denoise=yes",
    f"{SAMPLE} --denoise_steps=4",
)
# Of a pipeline `pipe`, two of its images `x`, and a key.
CALLS = (
    "TarFlowPipeline(pipe.config, None)",
    "TarFlowPipeline(pipe.config, {})",
    "TarFlowPipeline(pipe.config, pipe.variables, 0.1)",
    "pipe.sample(0, 4)",
    "pipe.sample(key, '4')",
    "pipe.sample(key, True)",
    "pipe.sample(key, 2.5)",
    "pipe.sample(key, 0)",
    "pipe.sample(key, 2, [3])",
    "pipe.sample(key, 2, ['cat', 'dog'])",
    "pipe.sample(key, 2, [3, 10])",
    "pipe.sample(key, 2, guidance=1.5)",
    "pipe.sample(key, 2, denoise='yes')",
    "pipe.sample(key, 2, denoise=IterativeDenoising(4))",
    "pipe.sample(key, 2, decoder='jacobi')",
    "pipe.sample(key, 2, decoder=Student())",
    "pipe.decode(x, decoder=GaussSeidelJacobi(99))",
    "pipe.decode(x, decoder=[Jacobi()])",
    "pipe.decode(x, guidance=Guidance(1.0, blocks=99))",
    "pipe.decode(x, guidance=Guidance(jnp.ones(2)))",
    "Guidance(weight='1')",
    "Guidance(rule='best')",
    "IterativeDenoising(1.5)",
    "Jacobi(tolerance=-1)",
    "Student(polish=-1)",
    "pipe.log_prob('cat.png')",
    "pipe.log_prob(x[0])",
    "pipe.log_prob((127.5 * (x + 1)).astype('uint8'))",
    "pipe.log_prob(x, noise_std=0.1)",
    "pipe.denoise(x, multiplier='1')",
    "pipe.denoise(x, noise_std=[0.1, 0.2])",
    "pipe.bits_per_dim(key, x)",
    "pipe.log_prob(100 * x)",
    "pipe.log_prob(jnp.nan * x)",
    "TarFlowPipeline(pipe.config, jax.tree.map(lambda w: jnp.nan * w, pipe.variables)).decode(x)",
)
PROGRAM = """
import logging, sys
import jax, jax.numpy as jnp
from tarflow_jax import Guidance, IterativeDenoising, TarFlowPipeline
from tarflow_jax.sampling import GaussSeidelJacobi, Jacobi, Student
told, handler = [], logging.Handler()
handler.emit = lambda record: told.append(f"warning: {record.getMessage()}")
logging.getLogger("tarflow_jax").addHandler(handler)
pipe, key = TarFlowPipeline.from_pretrained(sys.argv[1]), jax.random.key(0)
x = jnp.zeros((2, *pipe.config.image_shape)) + 0.1
for call in sys.argv[2:]:
    told.clear()
    try:
        eval(call)
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
    print(f"| `{call}` | {' '.join(told).replace('|', '/') or 'no word'} |")
"""


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
    """Prints the tables.

    Exits with 1 if a command showed a traceback, had another exit code, or no error line, or if a call had a raw error
    or passed in silence.
    """
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(tempfile.mkdtemp())
    names, failed = prepare(folder.resolve()), False
    print("| command | exit code | last line |\n|---|---|---|")
    for mistake in MISTAKES:
        code, out, err = commands.run("-m", *(word.format(**names) for word in mistake.split()))
        last = (err.strip() or out.strip() or " ").splitlines()[-1].replace(str(names["folder"]), "DIR")
        failed |= code != 1 or "Traceback" in err or not last.startswith("error: ")
        shown = mistake.replace("{folder}/", "DIR/").replace("{", "DIR/").replace("}", "")
        print(f"| `{shown}` | {code} | {last.replace('|', '/')} |", flush=True)
    code, out, err = commands.run("-c", PROGRAM, names["model"], *CALLS)
    print(f"\n| call | message |\n|---|---|\n{out}{err if code else ''}", end="")
    told = [row.split(" | ")[-1] for row in out.splitlines()]
    failed |= code != 0 or not all(message.startswith(("UserError: ", "warning: ")) for message in told)
    sys.exit(failed)


if __name__ == "__main__":
    try:
        main()
    except subprocess.TimeoutExpired as error:
        sys.exit(f"{error.cmd} did not end")
