"""Images per second: a folder of JPEG, packed, and cached, against torchvision's ImageFolder + DataLoader.

    python -m benchmarks.data [NUM_WORKERS]     # one worker per core by default; under two minutes

All read the same 1,500 generated JPEG files of about 400x350 (smooth shapes with noise) as shuffled batches of 64x64
uint8, resized bilinearly; the packed set holds them as 64x64 PNG in array_record. Runs alternate, and the table gives
the median of five. Needs requirements-dev.txt.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from tarflow_jax import data

NUM_IMAGES = 1500
BATCH_SIZE = 64
SIZE = (64, 64)
ROUNDS = 5


def write_images(root: Path) -> None:
    """Writes JPEG files in ten class folders, as large on disk as ImageNet's of the same size."""
    rng = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        width, height = rng.integers(300, 500), rng.integers(280, 420)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 14, 3), np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += rng.integers(-12, 13, (height, width, 1), np.int16)
        path = root / str(index % 10) / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def torchvision_batches(root: Path, num_workers: int) -> Iterator[object]:
    """Yields the batches that the reference trains on, before their conversion to floats."""
    import torch
    from torchvision import datasets, transforms

    torch.manual_seed(0)
    transform = transforms.Compose([transforms.Resize(SIZE[0]), transforms.CenterCrop(SIZE), transforms.PILToTensor()])
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(root), transform), BATCH_SIZE, shuffle=True, num_workers=num_workers
    )
    return iter(loader)


def images_per_second(batches: Iterator[object], num_images: int) -> float:
    """Measures the throughput after two batches, once workers have started."""
    count = num_images // BATCH_SIZE - 4
    for _ in islice(batches, 2):
        pass
    start = time.perf_counter()
    taken = sum(1 for _ in islice(batches, count))
    assert taken == count
    return count * BATCH_SIZE / (time.perf_counter() - start)


def main(argv: list[str]) -> None:
    """Writes the files, runs the loaders alternately, prints the table."""
    num_workers = int(argv[1]) if argv[1:] else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        # All images are in the training split, so that torchvision reads the same ones.
        root, options = Path(folder, "images", "train"), {"data_dir": Path(folder, "data")}
        root.mkdir(parents=True)
        write_images(root)
        test = Path(folder, "images", "test", "0")
        test.mkdir(parents=True)
        (test / "0.jpg").write_bytes((root / "0" / "0.jpg").read_bytes())

        options |= {"image_size": SIZE, "preprocessing": "tarflow"}
        start = time.perf_counter()
        name = data.prepare_source(f"folder:{root.parent}", **options)
        packing = NUM_IMAGES / (time.perf_counter() - start)
        jpeg = data.open_source(f"folder:{root.parent}", "train", **options)
        packed = data.open_source(name, "train")
        cached = data.open_source(name, "train", cache_bytes=2**30)
        cached.read(range(len(cached)))

        def ours(source: data.ImageSource) -> Callable[[], Iterator[object]]:
            return lambda: data.train_batches(source, batch_size=BATCH_SIZE, seed=0, num_workers=num_workers)

        runs = {
            "torchvision ImageFolder + DataLoader": lambda: torchvision_batches(root, num_workers),
            "folder of JPEG": ours(jpeg),
            "packed array_record": ours(packed),
            "cached": ours(cached),
        }
        figures = {run: [] for run in runs}
        for _ in range(ROUNDS):
            for run, batches in runs.items():
                figures[run].append(images_per_second(batches(), NUM_IMAGES))
        size = sum(path.stat().st_size for path in root.rglob("*.jpg")) / NUM_IMAGES
        print(f"{NUM_IMAGES} JPEG of {size / 1024:.0f} KiB on average, {num_workers} workers, {os.cpu_count()} cores")
        print(f"packing: {packing:,.0f} images/s")
        base = statistics.median(figures["torchvision ImageFolder + DataLoader"])
        for run, values in figures.items():
            median = statistics.median(values)
            print(f"{run:37} {median:9,.0f} images/s, {median / os.cpu_count():9,.0f} per core {median / base:7.2f} x")


if __name__ == "__main__":
    main(sys.argv)
