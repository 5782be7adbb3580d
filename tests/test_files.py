"""Files in an object store."""

import contextlib
import json
import os
import tracemalloc
import zipfile
from unittest import mock

import numpy as np
import pytest

from configs import digits
from tarflow_jax import figures
from tarflow_jax.evaluation import generation
from tarflow_jax.files import read_npz, remove_unfinished, replacing
from tarflow_jax.training import Recipe, metrics
from tarflow_jax.training.workdir import write_results, write_start


def test_all_of_a_workdir_but_its_checkpoints_goes_to_the_object_store(store, bucket, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(digits.get_config())
    recipe.write_to(bucket)
    assert Recipe.from_workdir(bucket).to_json() == recipe.to_json()
    write_results(bucket, {"loss": 1.0})
    for start in (0, 2):
        write_start(bucket, start)
        writer = metrics.MetricsWriter(bucket, start)
        for step in range(start + 1, start + 4):
            writer.write(step, {"loss": float(start)})
        writer.close()
    found = [json.loads(line) for line in (bucket / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in found] == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]
    starts = [json.loads(line) for line in (bucket / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 2]
    figures.save_gif(bucket / "figures" / "way.gif", [np.zeros((4, 4, 1), np.uint8)] * 2)
    sampler = mock.Mock(return_value=np.zeros((4, 2, 2, 1)), protocol=dict)
    chunks = generation.draw_samples(sampler, bucket / "evaluation", 4, (), seed=0, chunk_size=4)
    assert len(generation.read_chunks(chunks, 4, (), chunk_size=4).images) == 4
    assert not list(tmp_path.iterdir())
    assert {name.split("/")[1] for name in store.objects} == {
        "config.json",
        "results.json",
        "starts.jsonl",
        "metrics.jsonl",
        "tensorboard",
        "figures",
        "evaluation",
    }


def test_an_object_is_written_when_all_of_it_is_there(bucket):
    def half():
        with replacing(bucket / "a.json") as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert not (bucket / "a.json").exists()


def test_two_processes_of_one_number_write_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers
    path = tmp_path / "a.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write(b"first")
        second.write(b"second")
        assert len(list(tmp_path.iterdir())) == 2
        second.flush()
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
    with contextlib.suppress(FileNotFoundError), replacing(path) as file:
        file.write(b"half")
        remove_unfinished()  # the process is asked to stop
        assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"first"


def rewritten(path, old, new):
    """Replaces bytes in the first array of an npz file, whose members are not compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            assert old in content
            archive.writestr(name, content.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"(3, 4)", b"(3, 5)", "array x claims 15 bytes, but the file does not hold that many"),
        (b"(3, 4), }" + b" " * 7, b"(2147483648, 1),}", "array x claims 2147483648 bytes"),
        (b"(3, 4), }" + b" " * 12, b"(10000000000000, 12),}", "array x claims 120000000000000 bytes"),
        (b"|u1", b"|O1", "damaged|not supported|not valid|Python objects|not interpret|descr"),
        (b"\x93NUMPY", b"\x93NUMPX", "magic"),
    ],
)
def test_an_npz_allocates_no_more_than_it_holds(tmp_path, old, new, message):
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 4), np.uint8))
    rewritten(tmp_path / "x.npz", old, new)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"x.npz is not a readable npz file: .*({message})") as caught:
            read_npz(tmp_path / "x.npz", ("x",))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_an_npz_that_unpacks_to_more_than_its_bytes_can_or_may_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.zeros(1 << 20, np.uint8), y=np.ones(3))
    assert read_npz(path, ("y", "x", "z"))["x"].nbytes == 1 << 20
    with pytest.raises(ValueError, match="array x unpacks to 1048576 bytes, more than the 1048575 allowed"):
        read_npz(path, ("x",), max_bytes=(1 << 20) - 1)
    with monkeypatch.context() as small_machine:
        small_machine.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}.get)
        with pytest.raises(ValueError, match="array x unpacks to 1048576 bytes, more than the 40960 allowed"):
            read_npz(path, ("x",))
    size = (1 << 20) + 128
    content = path.read_bytes()
    claims = content.replace(size.to_bytes(4, "little"), (size + 2**30).to_bytes(4, "little"))
    path.write_bytes(claims)
    with pytest.raises(ValueError, match="but the file does not hold that many"):
        read_npz(path, ("x",))
    np.savez(path, allow_pickle=True, x=np.array([{}], object))
    with pytest.raises(ValueError, match="array x holds Python objects, which are never loaded"):
        read_npz(path, ("x",))
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"x\.npy is not a readable npz file: File is not a zip file"):
        read_npz(tmp_path / "x.npy", ("x",))
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(FileNotFoundError, match=r"pipe\.npz not found; expected an npz file"):
        read_npz(tmp_path / "pipe.npz", ("x",))
