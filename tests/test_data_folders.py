"""Image folders and packed sets: layouts, bad files, packing that resumes and notices changes."""

import hashlib
import io
import json
import logging
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

import commands
from tarflow_jax import data
from tarflow_jax.data import packed
from tarflow_jax.data.folder import list_folder
from tarflow_jax.data.registry import KINDS
from tarflow_jax.data.source import split_of
from tarflow_jax.figures import grid
from test_data_images import bomb

KINDS_OF_FILES = ("png", "jpg", "webp", "gif", "JPEG")
FOLDERS = ("bird/a", "cat", "dog")
NAMES = [f"{FOLDERS[index % 3]}/{index:03d}.{KINDS_OF_FILES[index % 5]}" for index in range(60)]


def write_image(path: Path, value: int, width: int = 20, height: int = 14) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, width, dtype=np.uint8) // 2 + np.uint8(value % 128)
    Image.fromarray(np.tile(ramp[:, None], (height, 1, 3))).save(path)


@pytest.fixture
def classes(tmp_path) -> Path:
    """60 images of all kinds in three class folders, one of them nested, beside files to be left alone."""
    root = tmp_path / "images"
    for index, name in enumerate(NAMES):
        write_image(root / name, index, 20 + index % 4)
    (root / "README.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_text("no image")
    (root / "loop").symlink_to(root)
    return root


@pytest.fixture
def options(tmp_path) -> dict:
    return {"data_dir": tmp_path / "data", "image_size": (12, 12), "preprocessing": "tarflow"}


def test_classes_are_subfolders_and_the_split_is_by_hash(classes, options):
    sources = {split: data.open_source(f"folder:{classes}", split, **options) for split in ("train", "test")}
    assert sum(map(len, sources.values())) == 60
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in NAMES}
    chosen = {name for name in NAMES if int(hashes[name][:16], 16) < 2**64 / 10}
    assert {name for name in NAMES if split_of(name) == "test"} == chosen
    assert {item.name for item in list_folder(classes, "test")[0]} == chosen
    assert {item.name for item in list_folder(classes, "train")[0]} == set(NAMES) - chosen
    for split, source in sources.items():
        assert source.label_names == ("bird", "cat", "dog")
        items = list_folder(classes, split)[0]
        assert [item.name for item in items] == sorted(item.name for item in items)
        labels = [("bird", "cat", "dog").index(item.name.split("/")[0]) for item in items]
        assert source.read(range(len(source)))[1].tolist() == labels


def test_the_split_stays_when_files_come(classes):
    before = {item.name for item in list_folder(classes, "test")[0]}
    for index in range(60, 90):
        write_image(classes / "cat" / f"{index:03d}.png", index)
    after = {item.name for item in list_folder(classes, "test")[0]}
    assert before == {name for name in after if int(Path(name).stem) < 60}


def test_flat_folders_have_no_labels(tmp_path):
    for index in range(30):
        write_image(tmp_path / "flat" / f"{index}.png", index)
    source = data.open_source(f"folder:{tmp_path}/flat", "train", data_dir=tmp_path / "data")
    assert (source.image_shape, source.num_classes) == ((14, 20, 3), 0)
    assert source[0]["label"] == -1


def test_split_folders_are_taken_as_they_are(tmp_path):
    for index in range(8):
        write_image(tmp_path / "set" / "train" / "ab"[index % 2] / f"{index}.png", index)
    write_image(tmp_path / "set" / "val" / "b" / "x.png", 1)
    sources = [
        data.open_source(f"folder:{tmp_path}/set", split, data_dir=tmp_path / "data") for split in ("train", "test")
    ]
    assert [len(source) for source in sources] == [8, 1]
    assert sources[1][0]["label"] == 1
    write_image(tmp_path / "set" / "val" / "c" / "x.png", 1)
    with pytest.raises(ValueError, match="class 'c' of c/x\\.png has no folder in the training split"):
        data.open_source(f"folder:{tmp_path}/set", "test", data_dir=tmp_path / "data")


def test_folders_that_make_no_sense(tmp_path, classes, options):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.png, .* files for the train split"):
        data.open_source(f"folder:{tmp_path}/empty", "train", **options)
    write_image(classes / "top.png", 1)
    with pytest.raises(ValueError, match="both beside and inside class folders"):
        data.open_source(f"folder:{classes}", "train", **options)


BAD_FILES = ("empty", "truncated", "text", "tiny", "bomb", "link", "pipe")


def add_bad_files(root: Path) -> set[str]:
    """Twenty files that are no usable images, all of the training split."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "png")
    names = (f"cat/bad{index}.png" for index in range(1000))
    names = [name for name in names if split_of(name) == "train"][:20]
    for index, name in enumerate(names):
        path, kind = root / name, BAD_FILES[index % len(BAD_FILES)]
        if kind == "link":
            path.symlink_to("nowhere.png")
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "tiny":
            write_image(path, 0, 1, 1)
        else:
            path.write_bytes({"truncated": file.getvalue()[:2000], "text": b"text", "bomb": bomb()}.get(kind, b""))
    return set(names)


def test_bad_files_are_listed_or_skipped(classes, options, caplog):
    good = len(data.open_source(f"folder:{classes}", "train", **options))
    names = add_bad_files(classes)
    with pytest.raises(ValueError, match=f"20 of {good + 20} files cannot be used") as caught:
        data.open_source(f"folder:{classes}", "train", **options)
    assert all(name in str(caught.value) for name in names)
    assert "exceeds limit of 178956970 pixels" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        source = data.open_source(f"folder:{classes}", "train", skip_bad=True, **options)
    assert f"skipping 20 of {good + 20} files as bad" in caplog.text
    assert len(source) == good
    assert source.read(range(good))[0].shape == (good, 12, 12, 3)


def test_the_check_is_kept_until_a_file_changes(classes, options, monkeypatch):
    from tarflow_jax.data import folder

    checks = []
    check_items = folder.check_items
    monkeypatch.setattr(folder, "check_items", lambda *arguments: checks.append(1) or check_items(*arguments))
    for _ in range(2):
        data.open_source(f"folder:{classes}", "train", **options)
    assert len(checks) == 1
    item = list_folder(classes, "train")[0][0]
    (classes / item.name).write_text("no longer an image")
    with pytest.raises(ValueError, match=f"{item.name} .not an image"):
        data.open_source(f"folder:{classes}", "train", **options)


def test_the_fingerprint_is_that_of_the_files(tmp_path, options):
    """Not of where they are, nor of their sizes: those of images without compression are all the same."""
    for name in ("here", "there"):
        for index in range(30):
            path = tmp_path / name / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index).integers(0, 256, (14, 20, 3), np.uint8)
            Image.fromarray(pixels).save(path, compress_level=0)

    def fingerprints(name):
        folder = data.open_source(f"folder:{tmp_path / name}", "train", **options)
        packed_name = data.prepare_source(f"folder:{tmp_path / name}", **options)
        return folder.fingerprint, data.open_source(packed_name, "train").fingerprint

    before = fingerprints("here")
    assert fingerprints("there") == before
    changed = tmp_path / "here" / list_folder(tmp_path / "here", "train")[0][0].name
    size = changed.stat().st_size
    Image.new("RGB", (20, 14)).save(changed, compress_level=0)
    assert changed.stat().st_size == size
    shutil.rmtree(options["data_dir"] / "packed")
    assert not set(fingerprints("here")) & set(before)
    assert fingerprints("there") == before


def test_a_file_that_turns_bad_while_training_is_named(classes, options):
    source = data.open_source(f"folder:{classes}", "train", **options)
    item = list_folder(classes, "train")[0][3]
    (classes / item.name).unlink()
    with pytest.raises(ValueError, match=f"{item.name}: No such file"):
        source.read([2, 3])


def test_packed_sets_hold_what_the_folder_does(classes, options):
    name = data.prepare_source(f"folder:{classes}", **options)
    for split in ("train", "test"):
        folder = data.open_source(f"folder:{classes}", split, **options)
        packed_set = data.open_source(name, split, **options)
        assert packed_set.label_names == folder.label_names
        assert packed_set.preprocessing == folder.preprocessing == "tarflow"
        for ours, theirs in zip(packed_set.read(range(len(packed_set))), folder.read(range(len(folder))), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    manifest = json.loads((Path(name.removeprefix("packed:")) / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    assert manifest["preprocessing"] == "tarflow"
    assert manifest["image_shape"] == [12, 12, 3]
    labels = data.open_source(name, "train").read(range(train["images"]))[1]
    assert train["class_counts"] == np.bincount(labels).tolist()
    for source in (data.open_source(name, "train"), data.open_source(f"folder:{classes}", "train", **options)):
        assert source.class_counts().tolist() == train["class_counts"]
    path, broken = Path(name.removeprefix("packed:")) / "manifest.json", json.loads(json.dumps(manifest))
    del broken["splits"]["train"]["shards"][0]["sha256"]
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"manifest.json: damaged"):
        data.open_source(name, "train")
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="packed with preprocessing tarflow, not adm; pack it again"):
        data.open_source(name, "train", preprocessing="adm")
    with pytest.raises(ValueError, match="its images are 12x12, but 8x8 is asked for"):
        data.open_source(name, "train", image_size=(8, 8))


def test_packed_images_without_classes_have_no_labels(tmp_path, options):
    for index in range(30):
        write_image(tmp_path / "flat" / f"{index}.png", index)
    name = data.prepare_source(f"folder:{tmp_path}/flat", **options)
    packed_set, folder = (data.open_source(source, "train", **options) for source in (name, f"folder:{tmp_path}/flat"))
    assert packed_set.num_classes == 0
    for ours, theirs in zip(packed_set.read(range(len(packed_set))), folder.read(range(len(folder))), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def shards_of(name: str) -> dict[str, tuple[int, bytes]]:
    folder = Path(name.removeprefix("packed:"))
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.array_record")}


def test_packed_sets_are_read_from_an_object_store(classes, options, store):
    name = data.prepare_source(f"folder:{classes}", **options)
    for path in Path(name.removeprefix("packed:")).iterdir():
        (epath.Path("gs://bucket/set") / path.name).write_bytes(path.read_bytes())
    here, there = (data.open_source(source, "train") for source in (name, "packed:gs://bucket/set"))
    assert there.fingerprint == here.fingerprint
    store.fault = lambda request: "cut" if request.number % 3 == 0 else None
    for ours, theirs in zip(there.read(range(len(there))), here.read(range(len(here))), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    store.fault = lambda request: 404
    with pytest.raises(ValueError, match=r"packed:gs://bucket/set: train image 0 cannot be read \(.*; if its shard is"):
        there.read([0])
    store.fault = lambda request: None
    del store.objects["set/train-00000.array_record"]
    with pytest.raises(ValueError, match=r"packed:gs://bucket/set: shards are missing or damaged"):
        data.open_source("packed:gs://bucket/set", "train")


def test_a_set_may_have_more_shards_than_a_process_has_open_files(classes, options, monkeypatch):
    monkeypatch.setattr(packed, "IMAGES_PER_SHARD", 1)
    name = data.prepare_source(f"folder:{classes}", **options)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        source = data.open_source(name, "train")
        assert len(source) > 40
        source.read(range(len(source)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_packing_goes_on_where_it_stopped(classes, options, monkeypatch):
    monkeypatch.setattr(packed, "IMAGES_PER_SHARD", 10)
    whole = shards_of(data.prepare_source(f"folder:{classes}", **options))
    splits = [split_of(name) for name in NAMES]
    assert len(whole) == sum(-(-splits.count(split) // 10) for split in ("train", "test"))
    options["data_dir"] = options["data_dir"] / "again"
    write_shard = packed.write_shard
    written = []

    def stop_after_three(path, *arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        return write_shard(path, *arguments)

    monkeypatch.setattr(packed, "write_shard", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_source(f"folder:{classes}", **options)
    folder = next((options["data_dir"] / "packed").iterdir())
    with pytest.raises(FileNotFoundError, match="holds no prepared set"):
        data.open_source(f"packed:{folder}", "train")
    before = shards_of(f"packed:{folder}")
    assert len(before) == 3
    monkeypatch.setattr(packed, "write_shard", write_shard)
    after = shards_of(data.prepare_source(f"folder:{classes}", **options))
    assert {name: content for name, (_, content) in after.items()} == {n: c for n, (_, c) in whole.items()}
    assert all(after[name] == before[name] for name in before)
    assert sorted(path.suffix for path in folder.iterdir()) == [".array_record"] * len(after) + [".json"]


def test_packing_again_checks_and_another_set_is_not_written_over(classes, options):
    name = data.prepare_source(f"folder:{classes}", **options)
    before = shards_of(name)
    assert data.prepare_source(f"folder:{classes}", **options) == name
    assert shards_of(name) == before
    write_image(classes / "cat" / "new.png", 3)
    with pytest.raises(ValueError, match="holds other files or preprocessing"):
        data.prepare_source(f"folder:{classes}", **options)
    assert shards_of(name) == before
    (classes / "cat" / "new.png").unlink()
    shard = Path(name.removeprefix("packed:")) / next(iter(before))
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="changed since it was packed"):
        data.prepare_source(f"folder:{classes}", **options)


def test_packing_lists_or_skips_bad_files(classes, options):
    names = add_bad_files(classes)
    with pytest.raises(ValueError, match="20 of 80 files cannot be used") as caught:
        data.prepare_source(f"folder:{classes}", **options)
    assert all(name in str(caught.value) for name in names)
    name = data.prepare_source(f"folder:{classes}", skip_bad=True, **options)
    assert sum(len(data.open_source(name, split)) for split in ("train", "test")) == 60
    manifest = json.loads((Path(name.removeprefix("packed:")) / "manifest.json").read_text())
    assert manifest["splits"]["train"]["skipped"] == 20


@pytest.mark.slow
def test_damaged_packed_sets_give_no_garbage(classes, options, damage):
    name = data.prepare_source(f"folder:{classes}", **options)
    folder = Path(name.removeprefix("packed:"))
    whole = data.open_source(name, "test").read(range(len(data.open_source(name, "test"))))
    refused = 0
    for path in (folder / "manifest.json", next(folder.glob("test-*.array_record"))):
        for _ in damage(path, 30):
            try:
                source = data.open_source(name, "test")
                found = source.read(range(len(source)))
            except ValueError:
                refused += 1
            else:
                np.testing.assert_array_equal(found[0], whole[0])
    assert refused > 20


def test_a_folder_of_16_bits_keeps_them(tmp_path):
    rng, root, options = np.random.default_rng(0), tmp_path / "deep", {"data_dir": tmp_path / "data"}
    root.mkdir()
    arrays = {f"{i:02d}.{('png', 'tif', 'TIFF')[i % 3]}": rng.integers(0, 65536, (9, 12), np.uint16) for i in range(40)}
    for name, array in arrays.items():
        Image.fromarray(array).save(root / name)
    source = data.open_source(f"folder:{root}", "train", cache_bytes=1000, **options)
    assert (source.bits, source.image_shape) == (16, (9, 12, 1))
    expected = [array for name, array in arrays.items() if split_of(name) == "train"]
    for _ in range(2):  # from the files, and some from memory
        np.testing.assert_array_equal(source.read(range(len(source)))[0][..., 0], expected)
    with pytest.raises(ValueError, match=r"cannot be used.*16 bits a number; expected 8"):
        data.prepare_source(f"folder:{root}", image_size=(9, 12), **options)
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(root / "shallow.png")
    with pytest.raises(ValueError, match=r"1 of \d+ files .*shallow.png \(8 bits a number; expected 16\)"):
        data.open_source(f"folder:{root}", split_of("shallow.png"), **options)


@pytest.mark.slow
def test_prepare_data_command(classes, tmp_path):
    def prepare(*flags: str) -> tuple[int, str, str]:
        return commands.run("-m", "launch.prepare_data", f"--data_dir={tmp_path}/data", *flags)

    flags = ["--image_size=16", "--preprocessing=adm", f"--preview={tmp_path}/p.png"]
    code, out, err = prepare(f"--data=folder:{classes}", *flags)
    assert code == 0, err
    assert "3 classes, preprocessing adm" in out
    name = f"packed:{tmp_path}/data/packed/images-16x16-adm"
    assert f"--config.data.source={name}" in out
    source = data.open_source(name, "train")
    assert len(source) == sum(split_of(file) == "train" for file in NAMES)
    first = next(data.train_batches(source, batch_size=64, seed=0)).image
    with Image.open(tmp_path / "p.png") as preview:
        np.testing.assert_array_equal(np.asarray(preview), grid(first))
    code, out, _ = prepare(f"--data=folder:{classes}", "--image_size=16", "--preprocessing=adm")
    assert (code, out.split()[-1]) == (0, f"{tmp_path}/data/packed/images-16x16-adm/preview.png")
    assert len(data.open_source(name, "train")) == len(source)
    code, _, err = prepare("--data=fold:x")
    assert code == 1
    assert err.startswith("error: unknown data set 'fold:x'")
    assert err.count("\n") == 1


def test_every_kind_is_documented():
    text = (Path(__file__).parents[1] / "docs" / "howto" / "data.md").read_text()
    assert all(f"`{kind.pattern}`" in text for kind in KINDS.values())
