"""Compares Inception in JAX with torch-fidelity: same weights, same images, same machine.

    python -m benchmarks.evaluation              # images/s through the network, both
    python -m benchmarks.evaluation agreement    # FID and its family, by both (half an hour of 2 cores)

Weights are random, in a file that both read. Needs requirements-dev.txt.
"""

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.data import open_source
from tarflow_jax.evaluation.distances import METRICS, Reference, sample_metrics
from tarflow_jax.evaluation.generation import as_colour
from tarflow_jax.evaluation.inception import InceptionV3, inception_network
from tarflow_jax.evaluation.scores import feature_statistics

NUM_IMAGES = 2048
ROUNDS = 5


def write_random_inception_weights(path: str | Path, seed: int = 0) -> None:
    """A PyTorch file shaped like pt_inception-2015-12-05-6726825d.pth; its random weights keep the signal's scale."""
    import torch

    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))["params"]
    state = {"fc.weight": random.normal(0, 0.05, (1008, 2048)), "fc.bias": random.normal(0, 0.05, 1008)}
    for keys, kernel in jax.tree_util.tree_leaves_with_path(shapes):
        *names, kind = (key.key for key in keys)
        if kind != "kernel" or names == ["fc"]:
            continue
        name, (rows, columns, inputs, outputs) = ".".join(names), kernel.shape
        scale = np.sqrt(2 / (rows * columns * inputs))
        state[f"{name}.conv.weight"] = random.normal(0, scale, (outputs, inputs, rows, columns))
        state[f"{name}.bn.weight"] = random.uniform(0.9, 1.3, outputs)
        state[f"{name}.bn.bias"] = random.normal(0, 0.2, outputs)
        state[f"{name}.bn.running_mean"] = random.normal(0, 0.2, outputs)
        state[f"{name}.bn.running_var"] = random.uniform(0.8, 1.2, outputs)
        state[f"{name}.bn.num_batches_tracked"] = np.array(1.0)
    torch.save({key: torch.tensor(array, dtype=torch.float32) for key, array in state.items()}, path)


def seconds_of_ours(path: str, images: np.ndarray) -> float:
    """Seconds for one batch after the first; the process keeps what is compiled."""
    if path not in _NETWORKS:
        _NETWORKS[path] = inception_network(path)
        _NETWORKS[path](images)
    start = time.perf_counter()
    _NETWORKS[path](images)
    return time.perf_counter() - start


def seconds_of_theirs(path: str, images: np.ndarray) -> float:
    """The same for torch-fidelity, which has no spatial features to compute."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    batch = torch.tensor(images.transpose(0, 3, 1, 2))
    if path not in _NETWORKS:
        features = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("theirs", features, feature_extractor_weights_path=path)
        _NETWORKS[path] = torch.no_grad()(network)
        _NETWORKS[path](batch)
    start = time.perf_counter()
    _NETWORKS[path](batch)
    return time.perf_counter() - start


_NETWORKS: dict = {}  # of one worker process


def speed(path: str) -> None:
    """Prints images/s of both, in alternating rounds, each in its own process."""
    images = np.random.default_rng(0).integers(0, 256, (32, 64, 64, 3), dtype=np.uint8)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as ours, ProcessPoolExecutor(1, spawn) as theirs:
        times = [
            (
                ours.submit(seconds_of_ours, path, images).result(),
                theirs.submit(seconds_of_theirs, path, images).result(),
            )
            for _ in range(ROUNDS)
        ]
    ours_best, theirs_best = np.min(times, axis=0)
    print(f"InceptionV3, 64 x 64 images, batches of {len(images)}, {jax.default_backend()}, best of {ROUNDS}:")
    print(f"  tarflow_jax     {len(images) / ours_best:7.1f} images/s")
    print(f"  torch-fidelity  {len(images) / theirs_best:7.1f} images/s")
    print(f"  ratio           {theirs_best / ours_best:7.2f}")


def fashion_mnist_images() -> np.ndarray:
    """Test images of fashion_mnist, uint8 [2 * NUM_IMAGES, 28, 28, 3]."""
    return as_colour(open_source("fashion_mnist", "test").read(np.arange(2 * NUM_IMAGES))[0])


def photograph_images() -> np.ndarray:
    """Random 64 x 64 crops of scikit-learn's two photographs, uint8 [2 * NUM_IMAGES, 64, 64, 3]."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    photographs = load_sample_images().images
    corners = random.integers(0, np.array(photographs[0].shape[:2]) - 64, (2 * NUM_IMAGES, 2))
    return np.stack([photographs[i % 2][y : y + 64, x : x + 64] for i, (y, x) in enumerate(corners)])


def metrics_of_theirs(path: str, generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """torch-fidelity's own entry point on the same arrays, under our names."""
    import torch
    import torch_fidelity

    def as_dataset(images: np.ndarray) -> torch.utils.data.Dataset:
        return torch.utils.data.ConcatDataset([torch.tensor(images.transpose(0, 3, 1, 2))])

    found = torch_fidelity.calculate_metrics(
        input1=as_dataset(generated),
        input2=as_dataset(real),
        feature_extractor="inception-v3-compat",  # for precision and recall too
        cuda=False,
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        verbose=False,
        cache=False,
        feature_extractor_weights_path=path,
    )
    return {
        "FID": found["frechet_inception_distance"],
        "inception score": found["inception_score_mean"],
        "KID": found["kernel_inception_distance_mean"],
        "precision (Inception features)": found["precision"],
        "recall (Inception features)": found["recall"],
    }


def agreement(path: str) -> None:
    """Prints every metric of both on 2,048 noisy images against 2,048 others, for a grey and a colour set."""
    network = inception_network(path)
    for name, images in (("fashion_mnist", fashion_mnist_images()), ("photographs", photograph_images())):
        noise = np.random.default_rng(1).normal(0, 12, images[:NUM_IMAGES].shape)
        generated = np.clip(images[:NUM_IMAGES] + noise, 0, 255).astype(np.uint8)
        real = network(images[NUM_IMAGES:])
        statistics = feature_statistics(real.pooled), feature_statistics(real.spatial)
        ours = sample_metrics(list(METRICS), "inception", network(generated), Reference(*statistics, real.pooled, {}))
        # In a process of its own: their loader starts more, which a process with JAX's threads should not.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            theirs = pool.submit(metrics_of_theirs, path, generated, images[NUM_IMAGES:]).result()
        print(f"{name}: {NUM_IMAGES} + {NUM_IMAGES} images")
        print(f"  {'':32}{'tarflow_jax':>14}{'torch-fidelity':>16}{'relative':>10}")
        for metric, value in theirs.items():
            error = abs(ours[metric] - value) / max(abs(value), 1e-12)
            print(f"  {metric:32}{ours[metric]:14.7g}{value:16.7g}{error:10.1e}", flush=True)


def main() -> None:
    """Writes the weights, runs the part that was asked for."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "random.pth")
        write_random_inception_weights(path)
        agreement(path) if "agreement" in sys.argv[1:] else speed(path)


if __name__ == "__main__":
    main()
