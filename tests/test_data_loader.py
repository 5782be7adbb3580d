"""Batches are a function of (seed, step): the same on any number of processes and after a resume."""

import io
from itertools import islice

import jax
import numpy as np
import pytest
from PIL import Image

from tarflow_jax import data
from tarflow_jax.data.source import EncodedSource, Item, OpenOptions

NUM_IMAGES = 37
BATCH_SIZE = 12


@pytest.fixture(scope="module")
def source() -> data.ArraySource:
    """Images that are all different, also from their mirror images."""
    images = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 4, 6, 3), np.uint8)
    return data.ArraySource("random", images, np.arange(NUM_IMAGES), NUM_IMAGES)


def take(source, count, **options) -> data.Batch:
    """The first batches, joined."""
    options = {"batch_size": BATCH_SIZE, "seed": 3, "flip": True} | options
    return data.Batch(*map(np.concatenate, zip(*islice(data.train_batches(source, **options), count), strict=True)))


def assert_equal(ours: data.Batch, theirs: data.Batch) -> None:
    for left, right in zip(ours, theirs, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_every_image_comes_once_an_epoch_in_another_order(source):
    labels = take(source, NUM_IMAGES).label.reshape(BATCH_SIZE, NUM_IMAGES)  # a row an epoch
    np.testing.assert_array_equal(np.sort(labels, 1), np.tile(np.arange(NUM_IMAGES), (BATCH_SIZE, 1)))
    assert len({tuple(epoch) for epoch in labels}) == BATCH_SIZE
    assert not np.array_equal(labels[0], take(source, NUM_IMAGES, seed=4).label[:NUM_IMAGES])


def test_neighbouring_seeds_share_no_epoch(source):
    orders = [take(source, 7, seed=seed).label for seed in (0, 1)]
    epochs = {tuple(order[start:][:NUM_IMAGES]) for order in orders for start in (0, NUM_IMAGES)}
    assert len(epochs) == 4


@pytest.mark.parametrize("num_workers", [0, 3])
def test_resume_gives_the_same_batches_across_epochs(source, num_workers):
    whole = take(source, 9)
    resumed = take(source, 5, start_step=4, num_workers=num_workers)
    assert_equal(resumed, data.Batch(*(part[4 * BATCH_SIZE :] for part in whole)))


def test_four_processes_see_what_one_does(source):
    whole = take(source, 7)
    order = np.random.default_rng(0).permutation(BATCH_SIZE).reshape(4, 3)  # on a torus neighbours lie anywhere
    for rows in np.sort(order):
        expected = [part.reshape(7, BATCH_SIZE, *part.shape[1:])[:, rows] for part in whole]
        expected = data.Batch(*(part.reshape(-1, *part.shape[2:]) for part in expected))
        assert_equal(take(source, 7, rows=rows), expected)


def test_flips_are_a_coin_s_for_each_step_and_row(source):
    plain, flipped = take(source, 40, flip=False), take(source, 40)
    np.testing.assert_array_equal(plain.image, source.images[plain.label])
    np.testing.assert_array_equal(plain.label, flipped.label)
    mirrored = (flipped.image == plain.image[:, :, ::-1]).all((1, 2, 3))
    same = (flipped.image == plain.image).all((1, 2, 3))
    assert (mirrored ^ same).all()
    coins = [np.random.default_rng((3, step)).random(BATCH_SIZE) < 0.5 for step in range(40)]
    np.testing.assert_array_equal(mirrored, np.concatenate(coins))


def test_batch_larger_than_the_set(source):
    batch = next(data.train_batches(source, batch_size=100, seed=0))
    assert batch.image.shape == (100, 4, 6, 3)
    assert set(batch.label[:NUM_IMAGES]) == set(range(NUM_IMAGES))


def test_prefetch_keeps_the_order_and_one_ahead(source):
    started = []

    def put(batch: data.Batch) -> jax.Array:
        started.append(batch)
        return jax.device_put(batch.label)

    labels = take(source, 5).label.reshape(5, -1)
    batches = islice(data.train_batches(source, batch_size=BATCH_SIZE, seed=3), 5)
    for step, batch in enumerate(data.prefetch_to_device(batches, put)):
        assert len(started) == min(step + 2, 5)
        np.testing.assert_array_equal(batch, labels[step])
    assert step == 4


def test_cache_reads_once_and_stays_in_its_bound(tmp_path):
    reads = []
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 8, 9, 3), np.uint8)
    source = data.ArraySource("random", pixels, np.arange(NUM_IMAGES), NUM_IMAGES)

    def item_at(index: int) -> Item:
        def read() -> bytes:
            reads.append(index)
            file = io.BytesIO()
            Image.fromarray(pixels[index]).save(file, "png")
            return file.getvalue()

        return Item(str(index), index, read)

    options = OpenOptions(tmp_path, cache_bytes=20 * pixels[0].size + 5)
    names = list(map(str, range(NUM_IMAGES)))
    cached = EncodedSource(
        "png", NUM_IMAGES, item_at, options, content="", image_shape=pixels.shape[1:], label_names=names
    )
    assert_equal(take(cached, 20), take(source, 20))
    expected = np.bincount(take(source, 20).label)  # how often each image is drawn
    expected[:20] = 1
    np.testing.assert_array_equal(np.bincount(reads), expected)
    assert_equal(take(cached, 20, num_workers=3), take(source, 20))
    assert [reads.count(index) for index in range(20)] == [1] * 20
    np.testing.assert_array_equal(cached.class_counts(), source.class_counts())


def test_unlabelled_images_have_label_minus_one():
    source = data.ArraySource("plain", np.zeros((3, 4, 4, 1), np.uint8))
    assert source.num_classes == 0
    assert source[0]["label"] == -1
    assert next(data.train_batches(source, batch_size=2, seed=0)).label.tolist() == [-1, -1]


def test_an_error_in_a_worker_reaches_the_caller(source):
    class Broken(data.ImageSource):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            raise ValueError("file 7 is damaged")

    for num_workers in (0, 2):
        with pytest.raises(ValueError, match="file 7 is damaged"):
            next(data.train_batches(Broken("b", (4, 4, 1), 0), batch_size=2, seed=0, num_workers=num_workers))


def test_bad_arrays_and_labels_are_refused():
    images = np.zeros((3, 4, 4, 1), np.uint8)
    message = "x: labels have 7 in row 1; expected integers from 0 to 4"
    with pytest.raises(ValueError, match=message):
        data.ArraySource("x", images, np.array([0, 7, 1]), 5)
    with pytest.raises(ValueError, match=r"x: labels are int64 \[2\]; expected integers \[3\]"):
        data.ArraySource("x", images, np.array([0, 1]), 5)
    with pytest.raises(ValueError, match="x: expected images as uint8"):
        data.ArraySource("x", images.astype(np.float32))
