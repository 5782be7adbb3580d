"""Sources by name: what they hold, and the one clear line where they cannot be opened."""

import functools
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import commands
from tarflow_jax import data
from tarflow_jax.data.source import split_of


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@functools.cache
def coloured_squares():
    """Defines a TFDS set, which TFDS then finds by its name."""
    import tensorflow_datasets as tfds

    class ColouredSquares(tfds.core.GeneratorBasedBuilder):
        """A TFDS set as others write them: images of several sizes, a validation split, some labels missing."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["red", "blue"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(9), "validation": self._generate_examples(4)}

        def _generate_examples(self, count=0):
            for index in range(count):
                file = self._data_dir_root + f"/{index}.png"
                Image.new("RGB", (20 + index, 30), ("red", "blue")[index % 2]).save(file)
                yield index, {"image": file, "label": -1 if index == 3 else index % 2}

    return ColouredSquares


def test_digits_are_scikit_learns(data_dir):
    from sklearn.datasets import load_digits

    digits = load_digits()
    for split, rows in {"train": slice(1500), "test": slice(1500, None)}.items():
        source = data.open_source("digits", split, data_dir=data_dir)
        assert source.image_shape == (8, 8, 1)
        assert source.num_classes == len(source.label_names) == 10
        np.testing.assert_array_equal(source.labels, digits.target[rows])
        np.testing.assert_array_equal(source.class_counts(), np.bincount(digits.target[rows]))
        np.testing.assert_array_equal(source.images[..., 0], np.rint(digits.images[rows] * 255 / 16))


@pytest.mark.slow
def test_tfds_sets_of_png_files_need_no_tensorflow(tmp_path):
    code = (
        "import sys; from tarflow_jax import data; import test_data_sources; test_data_sources.coloured_squares(); "
        "assert 'tensorflow_datasets.core' in sys.modules; name = data.prepare_source('tfds:coloured_squares'); "
        "source = data.open_source(name, 'train', image_size=(16, 16), preprocessing='adm'); "
        "print(source.read([0])[0].shape, 'tensorflow' in sys.modules)"
    )
    code, out, err = commands.run("-W", "error", "-c", code, TARFLOW_DATA_DIR=str(tmp_path), PYTHONPATH="tests")
    assert (code, out.splitlines()[-1]) == (0, "(1, 16, 16, 3) False"), err


@pytest.mark.slow
def test_digits_need_neither_tfds_nor_a_folder(tmp_path):
    code = (
        "import sys; from tarflow_jax import data; "
        "print(len(data.open_source('digits', 'train')), 'tensorflow_datasets.core' in sys.modules)"
    )
    code, out, err = commands.run("-W", "error", "-c", code, TARFLOW_DATA_DIR=str(tmp_path), PATH="")
    assert (code, out) == (0, "1500 False\n"), err
    assert not list(tmp_path.iterdir())


def write_idx(path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, count in {"train": 5, "t10k": 3}.items():
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    return tmp_path


def test_fashion_mnist_reads_idx_files(fashion):
    test = data.open_source(f"fashion_mnist:{fashion}", "test")
    assert (len(test), test.image_shape, test.num_classes) == (3, (28, 28, 1), 10)
    assert test[2]["label"] == 2
    assert test.label_names[9] == "Ankle boot"
    assert len(data.open_source(f"fashion_mnist:{fashion}", "train")) == 5


def test_sets_of_one_name_are_known_by_their_images_and_labels(fashion, tmp_path, monkeypatch):
    rng, names = np.random.default_rng(1), ("fashion_mnist:.", "npz:d.npz")
    fingerprints = set()
    for project in ("one", "two"):
        (tmp_path / project).mkdir()
        monkeypatch.chdir(tmp_path / project)
        for file in fashion.glob("*.gz"):
            shutil.copy(file, ".")
        write_idx(Path("train-images-idx3-ubyte.gz"), rng.integers(0, 256, (5, 28, 28), np.uint8))
        images, labels = rng.integers(0, 256, (30, 4, 4, 1), np.uint8), np.arange(30) % 3
        for found in (labels, labels[::-1]):  # another project's, and one changed in place
            np.savez("d.npz", images=images, labels=found)
            fingerprints |= {data.open_source(name, "train").fingerprint for name in names}
    assert len(fingerprints) == 2 + 4


@pytest.mark.slow
def test_damaged_idx_files_are_refused(fashion, damage):
    images = fashion / "t10k-images-idx3-ubyte.gz"
    for broken in damage(images, 60):
        try:
            source = data.open_source(f"fashion_mnist:{fashion}", "test")
        except ValueError as error:
            assert str(images) in str(error)  # noqa: PT017
        else:  # gzip does not check all of its header
            assert broken.exists()
            assert len(source) == 3
    write_idx(fashion / "t10k-labels-idx1-ubyte.gz", np.array([0, 1, 77], np.uint8))
    with pytest.raises(ValueError, match="labels have 77 in row 2; expected integers from 0 to 9"):
        data.open_source(f"fashion_mnist:{fashion}", "test")


def test_tfds_sets_by_name(data_dir):
    name = "tfds:coloured_squares"
    coloured_squares()
    with pytest.raises(FileNotFoundError, match="prepare_data --data=tfds:coloured_squares"):
        data.open_source(name, "train", data_dir=data_dir)
    assert data.prepare_source(name, data_dir=data_dir) == name
    options = {"data_dir": data_dir, "image_size": (16, 12), "preprocessing": "tarflow"}
    train = data.open_source(name, "train", **options)
    assert (len(train), train.image_shape, train.label_names) == (9, (16, 12, 3), ("red", "blue"))
    assert [int(train[index]["label"]) for index in range(5)] == [0, 1, 0, -1, 0]
    assert train.class_counts().tolist() == [5, 3]
    assert (train[1]["image"] == [0, 0, 255]).all()
    assert len(data.open_source(f"{name}:1.0.0", "test", **options)) == 4
    with pytest.raises(ValueError, match="images differ in size; an image size and a preprocessing are needed"):
        data.open_source(name, "train", data_dir=data_dir)


def test_a_set_that_needs_tensorflow_to_prepare_says_so(data_dir, monkeypatch):
    def missing(self, **options):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr(coloured_squares(), "download_and_prepare", missing)
    with pytest.raises(ValueError, match=r"a package that is missing \(.*tensorflow'\), such as tensorflow-cpu"):
        data.prepare_source("tfds:coloured_squares", data_dir=data_dir)


def test_a_full_disk_leaves_no_part_of_a_tfds_set(tmp_path, monkeypatch):
    def close(self):
        raise RuntimeError("write() failed: No space left on device; at byte 36864")

    coloured_squares()
    monkeypatch.setattr("array_record.python.array_record_module.ArrayRecordWriter.close", close, raising=True)
    with pytest.raises(ValueError, match=r"tfds:coloured_squares cannot be .*written to .*No space left on device"):
        data.prepare_source("tfds:coloured_squares", data_dir=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"]


@pytest.mark.parametrize("keys", [("images", "labels"), ("arr_0", "arr_1")])
def test_npz_files(tmp_path, keys):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "set.npz", **dict(zip(keys, (images, np.arange(60) % 4), strict=True)))
    sources = [data.open_source(f"npz:{tmp_path}/set.npz", split) for split in ("train", "test")]
    assert sum(map(len, sources)) == 60
    assert [source.num_classes for source in sources] == [4, 4]
    chosen = [index for index in range(60) if split_of(str(index)) == "test"]
    np.testing.assert_array_equal(sources[1].images, images[chosen])
    np.testing.assert_array_equal(sources[1].labels, np.array(chosen) % 4)


def test_npz_files_of_16_bits(tmp_path):
    images = np.random.default_rng(0).integers(0, 65536, (60, 8, 8), np.uint16)
    np.savez(tmp_path / "set.npz", images=images)
    source = data.open_source(f"npz:{tmp_path}/set.npz", "train")
    assert (source.bits, source.images.dtype) == (16, np.uint16)
    chosen = [index for index in range(60) if split_of(str(index)) == "train"]
    np.testing.assert_array_equal(source.read(range(len(source)))[0][..., 0], images[chosen])


@pytest.mark.slow
def test_bad_npz_files_are_refused(tmp_path, damage):
    path = tmp_path / "set.npz"
    for arrays in (
        {"other": np.zeros(3)},
        {"images": np.zeros((2, 8, 8, 3))},
        {"images": np.array([{}], object)},
    ):
        np.savez(path, allow_pickle=True, **arrays)
        with pytest.raises(ValueError, match=r"npz:.*expected|not a readable npz file: .*Python objects"):
            data.open_source(f"npz:{path}", "train")
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez_compressed(path, images=images)
    refused = 0
    for broken in damage(path, 40):
        try:
            assert data.open_source(f"npz:{broken}", "train").image_shape == (8, 8, 3)
        except ValueError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array(list("abc") * 20), r"labels are <U1 \[60\]; expected integers \[60\]"),
        (np.linspace(0, 1, 60), r"labels are float64 \[60\]"),
        (np.full(60, np.nan), "labels are float64"),
        (np.zeros(60, bool), "labels are bool"),
        (np.eye(60, dtype=int), r"labels are int64 \[60, 60\]"),
        (np.zeros(0, int), r"labels are int64 \[0\]"),
        (np.zeros((), int), r"labels are int64 \[\]"),
        (np.where(np.arange(60) == 7, 2**40, 1), f"labels have {2**40} in row 7"),
        (np.where(np.arange(60) == 7, 2**63 + 1, 1).astype(np.uint64), f"labels have {2**63 + 1} in row 7"),
        (np.where(np.arange(60) == 7, -1, 1), "labels have -1 in row 7; expected integers from 0 to 1"),
    ],
)
def test_labels_that_are_no_classes_are_refused_by_file_and_row(tmp_path, labels, message):
    np.savez(tmp_path / "set.npz", images=np.zeros((60, 8, 8), np.uint8), labels=labels)
    with pytest.raises(ValueError, match=rf"npz:.*set\.npz: {message}"):
        data.open_source(f"npz:{tmp_path}/set.npz", "train")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((60, 8, 8, 3), np.float32), r"got float32 \[60, 8, 8, 3\]; .* tarflow_jax.fit"),
        (np.zeros((60, 8, 8), np.int64), "got int64"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"with N > 0, got uint8 \[0, 8, 8, 3\]"),
        (np.zeros((), np.uint8), r"got uint8 \[\]"),
        (np.zeros(60, [("r", np.uint8)]), "expected images as uint8"),
        (np.array(["cat.png"] * 60), "got <U7"),
        (np.zeros((1, 8, 8), np.uint8), "none of its 1 images falls into the test split; expected more images"),
    ],
)
def test_images_that_are_none_are_refused_by_file(tmp_path, images, message):
    np.savez(tmp_path / "set.npz", images=images)
    with pytest.raises(ValueError, match=rf"npz:.*set\.npz: .*{message}"):
        data.open_source(f"npz:{tmp_path}/set.npz", "test")


def test_npz_files_in_fortran_order_and_other_byte_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "c.npz", images=images, labels=np.arange(60))
    np.savez(tmp_path / "f.npz", images=np.asfortranarray(images), labels=np.arange(60, dtype=">u2"))
    ours, theirs = (data.open_source(f"npz:{tmp_path}/{name}.npz", "train") for name in "cf")
    assert ours.fingerprint == theirs.fingerprint


def test_unknown_names_splits_and_options():
    message = "unknown data set 'digit'; expected one of digits, .*packed:FOLDER"
    for arguments, options, expected in (
        (("digit", "train"), {}, message),
        (("digits", "validation"), {}, "unknown split 'validation' of digits; expected one of train, test"),
        (("folder:", "train"), {}, "data set 'folder:' is incomplete; expected folder:PATH"),
        (("digits", "train"), {"preprocessing": "adm"}, "digits: its images are not resized"),
        (("digits", "train"), {"preprocessing": "crop"}, "'crop'; expected one of none, tarflow, adm"),
        (("digits", "train"), {"image_size": (8, 16)}, "digits: its images are 8x8, but 8x16 is asked for"),
        (("tfds:cifar11", "train"), {}, "tfds:cifar11: Dataset cifar11 not found"),
    ):
        with pytest.raises(ValueError, match=expected):
            data.open_source(*arguments, **options)


def test_missing_data_say_how_to_get_them(tmp_path):
    for name, expected in {
        f"fashion_mnist:{tmp_path}": "apt-get install dataset-fashion-mnist",
        f"folder:{tmp_path}/none": "no such folder",
        f"npz:{tmp_path}/none.npz": "none.npz not found; expected an npz file",
        f"packed:{tmp_path}": "holds no prepared set",
        "emoji64": "npm pack emoji-datasource-google",
    }.items():
        with pytest.raises(FileNotFoundError, match=expected):
            data.open_source(name, "train", data_dir=tmp_path)


def emoji_package(folder):
    """A package like npm's: 40 emoji in two categories, every second one with two skin tones, in RGBA."""
    images = folder / "package" / "img" / "google" / "64"
    images.mkdir(parents=True)
    entries = []
    for index in range(40):
        names = [f"{index:04x}.png"] + [f"{index:04x}-{tone}.png" for tone in ("a", "b") if index % 2]
        for name in names:
            Image.new("RGBA", (64, 64), (index, 0, 0, 255 if index else 0)).save(images / name)
        variants = [{"image": name, "has_img_google": True} for name in names]
        entry = {"unified": f"{index:04X}", "category": ("Objects", "Flags")[index % 2], **variants[0]}
        if index % 2:
            entry["skin_variations"] = {str(tone): variant for tone, variant in enumerate(variants[1:])}
        entries.append(entry)
    entries.append({"unified": "FFFF", "category": "Flags", "image": "ffff.png", "has_img_google": False})
    (folder / "package" / "emoji.json").write_text(json.dumps(entries))


def test_emoji64_from_a_package(tmp_path):
    import tarfile

    emoji_package(tmp_path)
    with tarfile.open(tmp_path / "emoji.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    assert data.prepare_source(f"emoji64:{tmp_path}/emoji.tgz", data_dir=tmp_path) == "emoji64"
    sources = [data.open_source("emoji64", split, data_dir=tmp_path) for split in ("train", "test")]
    assert [source.label_names for source in sources] == [("Flags", "Objects")] * 2
    assert sum(map(len, sources)) == 20 + 20 * 3
    content = [source.read(range(len(source))) for source in sources]
    reds = [set(images[:, 0, 0, 0].tolist()) for images, _ in content]
    assert reds[0].isdisjoint(reds[1])  # an emoji's variants lie on one side
    assert reds[0] | reds[1] == set(range(1, 40)) | {255}  # the transparent one is white
    assert all((labels == 1 - images[:, 0, 0, 0] % 2)[images[:, 0, 0, 1] == 0].all() for images, labels in content)


def test_damaged_emoji_tarballs_are_refused(tmp_path):
    for content in (b"", b"no tarball", gzip.compress(b"no tarball")):
        (tmp_path / "x.tgz").write_bytes(content)
        with pytest.raises(ValueError, match="npm pack emoji-datasource-google"):
            data.prepare_source(f"emoji64:{tmp_path}/x.tgz", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()
