"""Reads a packed set of a million images: start-up, memory, images/s, shuffling, and the position after kill -9.

    python -m benchmarks.data_at_scale [--images=1000000] [--shards=200] [--remote=gs://BUCKET/FOLDER]

Builds the set in a temporary folder: 16x16 PNG whose first pixel is the image's index. With --remote it copies the set
there, reads it from there too, and removes it. Every measurement runs in its own process. Takes about ten minutes.
"""

import argparse
import io
import json
import multiprocessing
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from tarflow_jax import data
from tarflow_jax.data import packed
from tarflow_jax.data.source import Item

BATCH_SIZE, SIZE, KILLS = 256, 16, 10
WORKERS = (1, 2, 4, 8, 16)
SPAWN = multiprocessing.get_context("spawn")


def write(folder: Path, shard: int, count: int) -> dict[str, Any]:
    """Writes a shard and returns its report."""
    first = shard * count
    coarse = np.random.default_rng(shard).integers(0, 256, (count, 4, 4, 3), np.uint8)
    images = coarse.repeat(SIZE // 4, 1).repeat(SIZE // 4, 2)
    images[:, 0, 0] = np.arange(first, first + count, dtype=">u4").view(np.uint8).reshape(count, 4)[:, 1:]

    def encoded(image: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png", compress_level=1)
        return file.getvalue()

    items = [Item(str(i), i % 10, bytes) for i in range(first, first + count)]
    return packed.write_shard(folder / f"train-{shard:05d}.array_record", "", items, map(encoded, images))


def build(folder: Path, images: int, shards: int) -> None:
    """Writes all shards, in parallel, and the manifest."""
    count = images // shards
    with ProcessPoolExecutor() as pool:
        reports = list(pool.map(write, [folder] * shards, range(shards), [count] * shards))
    train = {"images": images, "class_counts": [images // 10] * 10, "shards": [report["shard"] for report in reports]}
    manifest = {"format": packed.FORMAT, "fingerprint": "", "image_shape": [SIZE, SIZE, 3], "preprocessing": "none"}
    manifest |= {"label_names": list("0123456789"), "splits": {"train": train}}
    (folder / packed.MANIFEST).write_text(json.dumps(manifest))


def batches(name: str, start_step: int, workers: int) -> Iterator[data.Batch]:
    """Opens the set and returns its batches from a step on."""
    source = data.open_source(name, "train")
    return data.train_batches(source, batch_size=BATCH_SIZE, seed=0, start_step=start_step, num_workers=workers)


def process() -> dict[str, float]:
    """Returns this process's resident memory in MiB, its open files and its threads."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    files = len(os.listdir("/proc/self/fd"))
    return {"MiB": int(status["VmRSS"].split()[0]) / 1024, "files": files, "threads": int(status["Threads"])}


def read(name: str, workers: int, num_batches: int) -> dict[str, Any]:
    """Reads batches; returns seconds to open the set and to the first batch, images/s, and growth of the process."""
    before, start = process(), time.perf_counter()
    stream = batches(name, 0, workers)
    opened = time.perf_counter() - start
    next(stream)
    first = time.perf_counter() - start
    for _ in range(2 * workers):  # read ahead while the first one came
        next(stream)
    num_batches = max(num_batches, 10 * workers)  # five times as many as are read ahead
    start, cpu = time.perf_counter(), time.process_time()
    images = np.concatenate([batch.image[:, 0, 0].copy() for batch in islice(stream, num_batches)])
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert len(np.unique(images, axis=0)) == len(images)  # less than an epoch: no image twice
    row = {"workers": workers, "open s": opened, "first batch s": first, "images/s": len(images) / seconds}
    row["CPU µs an image"] = cpu / len(images) * 1e6
    return row | {f"+ {key}": value - before[key] for key, value in process().items()}


class Indices(data.ImageSource):
    """Has indices for images: shows the order in which `train_batches` reads."""

    def __init__(self, count: int) -> None:
        super().__init__("indices", (1, 1, 1), 0)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": np.full((1, 1, 1), index), "label": np.int32(-1)}


def shuffling(images: int, shards: int) -> dict[str, Any]:
    """Returns how random two epochs are, beside what a random permutation would have."""
    stream = data.train_batches(Indices(images), batch_size=BATCH_SIZE, seed=0)
    order = np.concatenate([batch.image.ravel() for batch in islice(stream, 2 * images // BATCH_SIZE + 1)])
    one, two = order[:images], order[images : 2 * images]
    shard = one // (images // shards)
    whole = shard[: images // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    expected = shards * (1 - (1 - 1 / shards) ** BATCH_SIZE)
    return {
        "every image once in each epoch": all(
            np.array_equal(np.sort(epoch), np.arange(images)) for epoch in (one, two)
        ),
        f"shards in a batch of {BATCH_SIZE}": f"{np.mean([len(set(row)) for row in whole]):.2f} "
        f"(random: {expected:.2f})",
        "successive images of one shard": f"{np.mean(shard[1:] == shard[:-1]):.5f} (random: {1 / shards:.5f})",
        "correlation of position and index": f"{np.corrcoef(one, np.arange(images))[0, 1]:+.5f} "
        f"(random: 0 ± {images**-0.5:.5f})",
        "correlation of two epochs": f"{np.corrcoef(np.argsort(one), np.argsort(two))[0, 1]:+.5f} (the same)",
    }


def consume(name: str, start_step: int, steps: int, file: Path) -> None:
    """Appends a line for each batch: its step and a checksum."""
    with file.open("a") as lines:
        for step, batch in enumerate(islice(batches(name, start_step, 4), steps), start_step):
            lines.write(f"{step} {zlib.crc32(batch.image.tobytes() + batch.label.tobytes())}\n")
            lines.flush()


def killed(name: str, images: int, folder: Path) -> str:
    """Reads from the end of the first epoch on, killed at random moments of the second and resumed."""
    first, steps, rng = images // BATCH_SIZE - 5, 400, np.random.default_rng(0)
    consume(name, first, steps, folder / "whole")
    whole, parts = (folder / "whole").read_text().splitlines(), folder / "parts"
    parts.touch()
    for _ in range(KILLS):
        lines = parts.read_text().splitlines(keepends=True)
        parts.write_text("".join(line for line in lines if line.endswith("\n")))
        done = len(lines)
        child = SPAWN.Process(target=consume, args=(name, first + done, steps - done, parts))
        child.start()
        while parts.read_text().count("\n") < done + 10:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        child.kill()
        child.join()
    lines = parts.read_text().splitlines()
    consume(name, first + len(lines), steps - len(lines), parts)
    assert parts.read_text().splitlines() == whole
    return f"{KILLS} kills in the second epoch: all {steps} batches as those of an undisturbed reader"


def apart(function: Any, *arguments: Any) -> Any:
    """Returns the result of a call in a new process."""
    with ProcessPoolExecutor(1, SPAWN) as pool:
        return pool.submit(function, *arguments).result()


def table(name: str, workers: Sequence[int], num_batches: int) -> None:
    """Prints a row for each number of workers, measured in a process of its own."""
    for i, count in enumerate(workers):
        row = apart(read, name, count, num_batches)
        if i == 0:
            print(f"\n{name}\n| {' | '.join(row)} |\n|{'---|' * len(row)}")
        cells = (
            f"{value:.2f}" if isinstance(value, float) and value < 10 else f"{value:,.0f}" for value in row.values()
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Builds, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--remote", help="a folder of an object store")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, name = Path(temporary, "packed"), f"packed:{temporary}/packed"
        start = time.perf_counter()
        build(folder, args.images, args.shards)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(
            f"{args.images:,} images in {args.shards} shards, {size / 2**20:,.0f} MiB, built in "
            f"{time.perf_counter() - start:.0f} s on {os.cpu_count()} cores",
            flush=True,
        )
        table(name, WORKERS, min(150, args.images // BATCH_SIZE // 2))
        table(name, (4,), args.images // BATCH_SIZE - 10)  # the whole epoch
        for measure, value in apart(shuffling, args.images, args.shards).items():
            print(f"{measure}: {value}")
        print(killed(name, args.images, Path(temporary)), flush=True)
        if args.remote:
            remote = epath.Path(args.remote)
            for path in folder.iterdir():
                (remote / path.name).write_bytes(path.read_bytes())
            table(f"packed:{args.remote}", WORKERS, 10)
            remote.rmtree()


if __name__ == "__main__":
    main()
