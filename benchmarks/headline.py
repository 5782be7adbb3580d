"""The table of headline figures: launch.evaluate of each model in models/, beside real images.

    python -m benchmarks.headline [--models=digits,digits_likelihood] [--seeds=3]

Adds the missing rows to docs/results/headline.jsonl, one for each model and sampling seed, and writes the table between
the lines `<!-- headline -->` and `<!-- end -->` of README.md and docs/results.md. Rows of other weights are not used.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tarflow_jax import TarFlowPipeline
from tarflow_jax.fingerprint import fingerprint

ROWS, PAGES = Path("docs/results/headline.jsonl"), (Path("README.md"), Path("docs/results.md"))
DISTANCE, BITS = "Fréchet distance (classifier features)", "bits/dim"
FLOORS = Path("docs/results/judges.jsonl")
BLOCK = re.compile(r"(<!-- headline -->\n).*?(<!-- end -->\n)", re.DOTALL)


class Headline(NamedTuple):
    """What a model claims."""

    data_set: str
    figure: str
    flags: tuple[str, ...]  # of launch.evaluate


SAMPLES = ("--metrics=fid,precision_recall", "--num_samples=10000", "--denoise=true")
MODELS = {
    "digits": Headline("digits", DISTANCE, (*SAMPLES, "--guidance=0")),
    "digits_likelihood": Headline("digits", BITS, ("--metrics=bits_per_dim", "--dequantisation_draws=10")),
}


def measure(name: str, seed: int) -> dict[str, Any]:
    """A row: the results and the protocol that launch.evaluate writes."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "launch.evaluate", f"--model={name}", f"--seed={seed}", f"--out={out}"]
        subprocess.run([*command, *MODELS[name].flags], check=True)
        found = json.loads(next(Path(out).glob("*.json")).read_text())
    return {"model": name, "seed": seed, "date": time.strftime("%Y-%m-%d"), **found}


def figure_of(row: dict[str, Any]) -> float:
    """The headline figure of a row."""
    name = MODELS[row["model"]].figure
    results = [found for each in row["results"].values() for found in (each if isinstance(each, list) else [each])]
    return next(result[name] for result in results if name in result)


def table(rows: list[dict[str, Any]]) -> str:
    """The table, as Markdown."""
    floors = [json.loads(line) for line in FLOORS.read_text().splitlines()]
    real = {floor["data_set"]: f"{floor['distance']:.3g} ({floor['real_images']:,})" for floor in floors}
    lines = ["| model | distance | real test images | bits/dim |", "|---|---|---|---|"]
    for name, headline in MODELS.items():
        figures = [figure_of(row) for row in rows if row["model"] == name]
        if not figures:
            continue
        spread = f" ± {np.std(figures, ddof=1):.2g}" if len(figures) > 1 else ""
        text = f"{np.mean(figures):.3g}{spread}"
        cells = (text, real[headline.data_set], "") if headline.figure == DISTANCE else ("", "", text)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures what is missing, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="names, with commas between them")
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds of each distance")
    args = parser.parse_args()
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    weights = {name: fingerprint(TarFlowPipeline.from_pretrained(name).variables) for name in MODELS}
    rows = [row for row in rows if row["protocol"]["fingerprint"] == weights[row["model"]]]
    known = {(row["model"], row["seed"]) for row in rows}
    for name in args.models.split(","):
        for seed in range(args.seeds if MODELS[name].figure == DISTANCE else 1):
            if (name, seed) not in known:
                rows.append(measure(name, seed))
                with ROWS.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    for page in PAGES:
        page.write_text(BLOCK.sub(lambda found: f"{found[1]}\n{table(rows)}\n{found[2]}", page.read_text()))


if __name__ == "__main__":
    main()
