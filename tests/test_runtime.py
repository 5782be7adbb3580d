"""Batches of any size, cores, and programs that compile once a process."""

import dataclasses
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

import tarflow_jax
from tarflow_jax import Guidance, Noise, TarFlowPipeline
from tarflow_jax.runtime import (
    BatchRunner,
    LazyBatch,
    Preempted,
    PreemptionGuard,
    batch_runner,
    environment,
    make_mesh,
    progress,
)
from tarflow_jax.runtime.environment import commit_of
from tiny_models import LABELS, TINY, images_of, random_variables

ROOT = Path(__file__).parent.parent


@functools.partial(jax.jit, static_argnums=0)
def scaled(factor, variables, x, labels, shift):
    """float32 [B, 2] and [B]."""
    labels = 0 if labels is None else labels[:, None]
    return factor * variables["a"] * x + shift + labels, x.sum(1)


@pytest.mark.parametrize("devices", [0, 1, 8])
@pytest.mark.parametrize("affordable", [1, 3, 100])
def test_any_number_of_rows_gives_each_its_own_result(devices, affordable):
    mesh = make_mesh(devices=jax.devices()[:devices]) if devices else None
    runner = BatchRunner(mesh, memory_bound=10 * affordable)
    x = np.arange(22, dtype=np.float32).reshape(11, 2)
    labels = np.arange(11, dtype=np.float32)
    program, variables = functools.partial(scaled, 2), {"a": np.float32(3)}
    read = []

    def rows_of(index):
        read.extend(index.tolist())
        return {"x": x[index], "labels": labels[index]}

    in_memory = {"x": x, "labels": labels}
    for rows, added in (
        (in_memory, labels),
        (in_memory | {"labels": None}, 0 * labels),
        (LazyBatch(rows_of, 11), labels),
    ):
        found, total = runner.run(program, variables, rows, bytes_per_image=10, shift=np.float32(1))
        np.testing.assert_array_equal(found, 6 * x + 1 + added[:, None])
        np.testing.assert_array_equal(total, x.sum(1))
    assert sorted(read) == list(range(11))


@pytest.mark.parametrize("bound", [1, 8, 70, 10_000])
def test_the_memory_bound_holds_for_all_that_runs_at_once(monkeypatch, bound):
    monkeypatch.setattr(batch_runner, "usable_cores", lambda: 64)
    pools = []
    monkeypatch.setattr(batch_runner, "ThreadPoolExecutor", lambda n: pools.append(n) or ThreadPoolExecutor(n))
    changed, sizes, started, most = threading.Condition(), [], 0, 0

    def program(variables, x):
        """Returns when every thread is in here, or the last batch is; the first batch of a program runs alone."""
        nonlocal started, most
        with changed:
            started += 1
            sizes.append(len(x))
            most = max(most, sum(sizes))
            changed.notify_all()
            if started > 1:
                assert changed.wait_for(
                    lambda: not pools or len(sizes) == pools[0] or started * len(x) >= 200, timeout=60
                )
            sizes.pop()
        return x

    x = np.arange(200, dtype=np.float32)
    runner = BatchRunner(None, memory_bound=bound)
    found = runner.run(functools.partial(program), None, {"x": x}, bytes_per_image=1)
    np.testing.assert_array_equal(found, x)
    assert most <= bound
    assert most > min(bound, 200) // 4  # and it is made use of


def test_a_signal_stops_between_batches():
    runner, calls = BatchRunner(None, memory_bound=1), []

    def program(variables, x):
        calls.append(len(x))
        guard._request(signal.SIGTERM, None)
        return x

    with PreemptionGuard() as guard, pytest.raises(Preempted, match="asked to stop"):
        runner.run(functools.partial(program), None, {"x": np.zeros(20, np.float32)}, bytes_per_image=1)
    assert calls == [1]


def test_a_second_sigterm_does_not_keep_a_run_from_saving(monkeypatch):
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    with PreemptionGuard() as guard:
        for _ in range(2):  # Slurm sends it twice at once when it preempts without a grace time
            signal.raise_signal(signal.SIGTERM)
        assert (guard.signal, exits) == (signal.SIGTERM, [])
        signal.raise_signal(signal.SIGINT)
        assert exits == [130]


@pytest.fixture(scope="module")
def compilations():
    """A list that grows by each compilation of this process."""
    events: list[str] = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return events


def use(pipe, weight):
    """Everything a pipeline does."""
    images, guidance = np.asarray(images_of(TINY)), Guidance(weight)
    latents, _ = pipe.encode(images, LABELS)
    pipe.decode_trace(latents, LABELS, guidance)
    pipe.log_prob(images, LABELS)
    pipe.bits_per_dim(jax.random.key(0), np.zeros(images.shape, np.uint8), LABELS)
    return np.asarray(pipe.sample(jax.random.key(weight), 3, LABELS, guidance))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [None, 2])
def test_a_second_pipeline_of_a_shape_compiles_nothing(compilations, devices):
    mesh = make_mesh(devices=jax.devices()[:devices]) if devices else None
    new_shape = dataclasses.replace(TINY, input_limit=9.0)  # which no other test of this process has compiled
    first, second = (
        TarFlowPipeline(new_shape, random_variables(TINY, seed, 0.03), Noise("gaussian", 0.1), mesh=mesh)
        for seed in (0, 1)
    )
    drawn = use(first, 1)
    before = len(compilations)
    assert before  # the listener hears them
    others = use(second, 2)
    assert len(compilations) == before
    assert np.abs(drawn - others).max() > 0.01


@pytest.mark.slow
def test_each_core_is_a_device_and_each_device_has_its_rows():
    program = "; ".join(
        [
            "import jax",
            "from tarflow_jax.runtime import cores",
            "cores.usable_cores = lambda: 6",
            "cores.use_cores_as_devices(32)",
            "print(jax.device_count())",
            "cores.use_cores_as_devices(8)",
            "print(jax.device_count())",
        ]
    )
    for flags, count in (("", 4), ("--xla_force_host_platform_device_count=3", 3)):
        environment = os.environ | {"XLA_FLAGS": flags}
        out = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=environment, text=True)
        assert list(map(int, out.split())) == [count, count]


def test_an_environment_names_release_commit_and_machine(tmp_path):
    found = environment()
    assert found["tarflow_jax"] == tarflow_jax.__version__
    assert (found["jax"], found["devices"], found["processes"]) == (jax.__version__, "8 x cpu", 1)
    assert json.loads(json.dumps(found)) == found
    assert not [name for name, value in found.items() if name != "commit" and not value]
    git = ("git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b")
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").write_text("1")
    for words in (("init",), ("add", "file"), ("commit", "-m", "first")):
        subprocess.run([*git, *words], check=True, capture_output=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert commit_of(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == f"{commit}-dirty"
    assert commit_of(tmp_path / "inside") is None  # as a package that is installed in somebody's repository


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "seconds", "description", "seen"),
    [
        (Terminal, 0, "things", True),
        (Terminal, 9, "things", False),
        (Terminal, 0, None, False),
        (io.StringIO, 0, "things", False),
    ],
)
def test_a_bar_with_the_time_left_is_seen_on_a_terminal_where_work_is_long(
    monkeypatch, stream, seconds, description, seen
):
    monkeypatch.setattr(sys.modules[progress.__module__], "_PROGRESS_DELAY_S", seconds)
    monkeypatch.setattr(sys, "stderr", stream())
    assert [time.sleep(0.11) or i for i in progress(range(3), description)] == [0, 1, 2]
    assert bool(re.search(r"things: +67%.*\[00:00<00:00", sys.stderr.getvalue())) == seen
    assert seen or not sys.stderr.getvalue().strip("\r ")
