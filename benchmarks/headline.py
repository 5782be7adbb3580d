"""The table of headline figures: launch.evaluate of each model in models/, beside real images.

    python -m benchmarks.headline [--seeds=3]

Adds the missing rows to docs/results/headline.jsonl, one for each model and sampling seed, and writes the table between
the lines `<!-- headline -->` and `<!-- end -->` of README.md and docs/results.md. Rows of other weights are not used.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import evaluate, json_lines
from tarflow_jax import Guidance, TarFlowPipeline
from tarflow_jax.fingerprint import fingerprint

ROWS, PAGES = Path("docs/results/headline.jsonl"), (Path("README.md"), Path("docs/results.md"))
DISTANCE, BITS = "Fréchet distance (classifier features)", "bits/dim"
FLOORS = Path("docs/results/judges.jsonl")
BLOCK = re.compile(r"(<!-- headline -->\n).*?(<!-- end -->\n)", re.DOTALL)


class Headline(NamedTuple):
    """What a model claims: the distance of samples to the training images, or without samples bits/dim."""

    data_set: str
    num_samples: int = 0
    guidance: Guidance = Guidance(0.0)
    captions: str = ""  # file of captions, of training images; none for labels

    @property
    def figure(self) -> str:
        """The name of the figure in the results of launch.evaluate."""
        return DISTANCE if self.num_samples else BITS

    @property
    def flags(self) -> list[str]:
        """Flags of launch.evaluate."""
        if not self.num_samples:
            return ["--metrics=bits_per_dim", "--dequantisation_draws=10"]
        found = ["--metrics=fid,precision_recall", "--denoise=true", f"--num_samples={self.num_samples}"]
        found += [f"--guidance={self.guidance.weight:g}", f"--guidance_schedule={self.guidance.schedule}"]
        return found + [f"--prompts={self.captions}"] * bool(self.captions)


MODELS = {
    "digits": Headline("digits", 10_000),
    "digits_likelihood": Headline("digits"),
    "fashion_mnist": Headline("fashion_mnist", 10_000, Guidance(1.5)),
    "fashion_mnist_likelihood": Headline("fashion_mnist"),
    "emoji64": Headline("emoji64", 1_000, Guidance(2.0, schedule="constant")),
    "emoji64_text": Headline("emoji64", 1_000, Guidance(2.0, schedule="constant"), "benchmarks/emoji_captions.txt"),
}


def measure(name: str, seed: int) -> dict[str, Any]:
    """A row: the results and the protocol that launch.evaluate writes."""
    claim = MODELS[name]
    found = evaluate(f"--model={name}", f"--data={claim.data_set}", f"--seed={seed}", *claim.flags)
    return {"model": name, "seed": seed, "date": time.strftime("%Y-%m-%d"), **found}


def figure_of(row: dict[str, Any]) -> float:
    """The headline figure of a row."""
    name = MODELS[row["model"]].figure
    results = [found for each in row["results"].values() for found in (each if isinstance(each, list) else [each])]
    return next(result[name] for result in results if name in result)


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The table, as Markdown."""
    floors = [json.loads(line) for line in FLOORS.read_text().splitlines()]
    real = {floor["data_set"]: f"{floor['distance']:.3g} ({floor['real_images']:,})" for floor in floors}
    lines = ["| model | distance | real test images | bits/dim |", "|---|---|---|---|"]
    for name, measurements in rows.items():
        text, headline = summary(measurements), MODELS[name]
        cells = (text, real[headline.data_set], "") if headline.figure == DISTANCE else ("", "", text)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation of a model's headline figure."""
    figures = [figure_of(row) for row in rows]
    spread = f" ± {np.std(figures, ddof=1):.2g}" if len(figures) > 1 else ""
    return f"{np.mean(figures):.3g}{spread}"


def measured(name: str, seeds: int) -> list[dict[str, Any]]:
    """Rows of a model's present weights, by sampling seed; adds the missing ones to the file."""
    rows = json_lines(ROWS)
    weights = fingerprint(TarFlowPipeline.from_pretrained(name).variables)
    ours = [row for row in rows if (row["model"], row["protocol"]["fingerprint"]) == (name, weights)]
    found = {row["seed"]: row for row in ours}
    for seed in range(seeds if MODELS[name].figure == DISTANCE else 1):
        if seed not in found:
            found[seed] = measure(name, seed)
            with ROWS.open("a") as file:
                file.write(json.dumps(found[seed]) + "\n")
    return [found[seed] for seed in sorted(found)]


def main() -> None:
    """Measures what is missing, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds of each distance")
    args = parser.parse_args()
    lines = table({name: measured(name, args.seeds) for name in MODELS})
    for page in PAGES:
        page.write_text(BLOCK.sub(lambda found: f"{found[1]}\n{lines}\n{found[2]}", page.read_text()))


if __name__ == "__main__":
    main()
