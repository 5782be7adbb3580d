"""Trains the judges in models/judges, the classifiers that launch.evaluate measures with, and measures real images.

    python -m benchmarks.judges digits fashion_mnist emoji64 [--only_measure]

A judge is trained on the training images and saved in float32, or in bfloat16 if that takes more than 1.5 MB. Adds a
row per data set to docs/results/judges.jsonl: the judge; distance, precision and recall of the real test images against
the training images; and the distance of equally many training images, which only reflects their number.
"""

import argparse
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from benchmarks.sample_metrics import SampleMetrics
from tarflow_jax.data import open_source
from tarflow_jax.evaluation import classifier
from tarflow_jax.files import sha256
from tarflow_jax.interop.tensors import flatten

JUDGES, ROWS, MAX_FLOAT32_BYTES, SEED = Path("models/judges"), Path("docs/results/judges.jsonl"), 1_500_000, 0


def make(name: str) -> None:
    """Trains and writes the judge of a data set."""
    train, test = (open_source(name, split) for split in ("train", "test"))
    model, steps = classifier.Classifier(train.num_classes), classifier.num_steps(train)
    params = flatten(classifier.train_classifier(train, model, steps, classifier.BATCH_SIZE, SEED))
    size = sum(4 * math.prod(array.shape) for array in params.values())
    dtype = "float32" if size <= MAX_FLOAT32_BYTES else "bfloat16"
    weights = JUDGES / name / classifier.WEIGHTS
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(save({key: np.asarray(array, jnp.dtype(dtype)) for key, array in params.items()}))
    fields = {
        "data_set": name,
        "image_shape": list(train.image_shape),
        "num_classes": train.num_classes,
        "accuracy": 0.0,  # known once it is read as users read it, rounded
        "test_images": len(test),
        "sha256": sha256(weights),
        "dtype": dtype,
        "recipe": classifier.RECIPE,
        "steps": steps,
        "seed": SEED,
        "train_fingerprint": train.fingerprint[:16],
        "command": f"python -m benchmarks.judges {name}",
        "made": f"{time.strftime('%d %B %Y')}, JAX {jax.__version__}, {jax.devices()[0].platform}",
    }
    write(name, fields)
    images, labels = test.read(np.arange(len(test)))
    network, _ = classifier.read_judge(train)
    fields["accuracy"] = float((network(images).logits.argmax(1) == labels).mean())
    write(name, fields)


def write(name: str, fields: dict) -> None:
    """Writes judge.json."""
    (JUDGES / name / classifier.JUDGE).write_text(json.dumps(fields, indent=2) + "\n")


def measure(name: str) -> None:
    """Adds the row of a data set."""
    metrics = SampleMetrics(name)
    images, _ = metrics.test.read(np.arange(len(metrics.test)))
    row = {"data_set": name, "judge": metrics.network.identity, "real_images": len(images), **metrics(images)}
    among = np.random.default_rng(SEED).choice(len(metrics.train), len(images), replace=False)
    row["distance_of_as_many_training_images"] = metrics(metrics.train.read(np.sort(among))[0])["distance"]
    row["date"] = time.strftime("%Y-%m-%d")
    print(json.dumps(row), flush=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def main() -> None:
    """Makes and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="data sets")
    parser.add_argument("--only_measure", action="store_true", help="measure with the judges that are there")
    args = parser.parse_args()
    for name in args.names:
        if not args.only_measure:
            make(name)
        measure(name)


if __name__ == "__main__":
    main()
