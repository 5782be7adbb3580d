"""What is kept in an object store, gs://, and what happens when the store fails."""

import asyncio
import itertools
import random
import re
import time

import chex
import jax
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import tensorstore_utils

import commands
from object_store import Object
from tarflow_jax import Noise, TarFlowPipeline, TextToImage, files
from tarflow_jax.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderKL
from tarflow_jax.training import Checkpoints
from tarflow_jax.training.metrics import MetricsWriter
from tiny_models import TINY, random_variables

STATE = {"kernel": jax.random.normal(jax.random.key(0), (64, 64)), "bias": np.ones(3, np.float32)}
SHAPES = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), STATE)


@pytest.fixture
def impatient(monkeypatch):
    """The clients try as often as usual, gcsfs 6 times, but TensorStore only 9, and neither waits for long."""
    import gcsfs.retry

    sleep = asyncio.sleep
    monkeypatch.setattr(gcsfs.retry.asyncio, "sleep", lambda seconds: sleep(seconds / 100))
    retries = {"max_retries": 8, "initial_delay": "10ms", "max_delay": "100ms"}
    monkeypatch.setitem(tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT, "gcs_request_retries", retries)


def test_what_another_process_wrote_is_seen(store, bucket):
    files.write_text(bucket / "a" / "1.json", "{}")
    assert [path.name for path in (bucket / "a").iterdir()] == ["1.json"]
    store.objects["run/a/2.json"] = Object(b"{}", 10**6, time.time())
    assert [path.name for path in (bucket / "a").iterdir()] == ["1.json", "2.json"]
    del store.objects["run/a/1.json"]
    assert not (bucket / "a" / "1.json").exists()


@pytest.mark.slow
def test_all_parts_of_text_to_image_are_saved_to_the_store(store, bucket):
    shape = {"latent_channels": 3, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    config = AutoencoderConfig(**shape, mid_block_add_attention=False)
    params = jax.jit(AutoencoderKL(config).init)(jax.random.key(0), np.zeros((1, 4, 6, 3), np.float32))["params"]
    pipe = TextToImage(TarFlowPipeline(TINY, random_variables(TINY)), Autoencoder(config, params))
    pipe.save_pretrained(bucket / "model")
    found = TextToImage.from_pretrained(bucket / "model")
    chex.assert_trees_all_equal(found.flow.variables, pipe.flow.variables)
    chex.assert_trees_all_equal(found.autoencoder.params, pipe.autoencoder.params)


def test_a_model_is_saved_to_the_store_and_opened_from_it(store, bucket):
    pipe = TarFlowPipeline(TINY, random_variables(TINY), Noise("gaussian", 0.1))
    for _ in range(2):  # the second replaces the first
        pipe.save_pretrained(bucket / "model")
    assert set(store.objects) == {f"run/model/{name}" for name in ("config.json", "model.safetensors", "README.md")}
    found = TarFlowPipeline.from_pretrained(bucket / "model")
    chex.assert_trees_all_equal(found.variables, pipe.variables)
    assert (found.config, found.student) == (TINY, None)
    files.write_text(bucket / "config.json", "{}")
    with pytest.raises(ValueError, match=r"gs://bucket/run holds config.json, which is not a saved model's"):
        pipe.save_pretrained(bucket)
    assert store.objects["run/config.json"].content == b"{}"
    with pytest.raises(FileNotFoundError, match=r"no config\.json in gs://bucket/none; expected a folder that save_"):
        TarFlowPipeline.from_pretrained("gs://bucket/none")


@pytest.mark.slow
def test_ended_at_any_request_a_run_goes_on_to_the_same_parameters(tmp_path):
    code, out, err = commands.run("tests/object_store_kills.py", tmp_path, 3)
    assert code == 0, err
    assert "the same parameters, bit for bit" in out


@pytest.mark.slow
def test_a_command_says_in_one_line_that_the_store_refuses(store, bucket):
    train = ("launch.train", "--config=configs/digits.py:smoke", f"--workdir={bucket}", "--config.train.sample_every=0")
    steps = ("--config.train.num_steps=4", "--config.train.checkpoint_every=2")
    store.fault = lambda request: 403 if request.method == "POST" and "checkpoints/2/" in request.name else None
    code, _, err = commands.run("-m", *train, *steps)
    assert code == 1
    assert re.fullmatch("error: could not write a checkpoint in gs://bucket/run/checkpoints: .*", err.splitlines()[-1])
    assert "Traceback" not in err
    store.fault = lambda request: 403
    code, _, err = commands.run("-m", "launch.sample", f"--workdir={bucket}")
    assert (code, err.splitlines()[-1]) == (1, "error: Forbidden: b/bucket/o injected")
    assert "Traceback" not in err


@pytest.mark.slow
def test_every_command_finds_its_files_in_the_store(store, bucket):
    metrics = ("--metrics=bits_per_dim", "--allow_noisy")
    steps = ("--config.train.num_steps=4", "--config.train.checkpoint_every=2")
    for command, *options in (
        ("launch.train", "--config=configs/digits.py:smoke", *steps),
        ("launch.distill", "--config=configs/student/digits.py:smoke", *steps),
        ("launch.sample", "--num_images=4", "--decoder=student"),
        ("launch.evaluate", *metrics),
    ):
        code, _, err = commands.run("-m", command, f"--workdir={bucket}", *options)
        assert code == 0, err
    written = {name.removeprefix("run/").split("/")[0] for name in store.objects}
    assert written >= {"checkpoints", "evaluation", "metrics.jsonl", "samples", "student", "tensorboard"}
    pipe = TarFlowPipeline.from_pretrained(bucket)
    assert pipe.student is not None
    assert pipe.sample(jax.random.key(0), 2).shape == (2, 8, 8, 1)


@pytest.mark.slow
def test_a_server_that_never_answers_is_asked_again_or_ends_in_one_line(store, bucket, monkeypatch):
    """Two requests for arrays wait for an hour, then one for a small file; timeouts are of seconds."""
    program = (
        "import sys; import fsspec; import jax; import numpy as np; from etils import epath\n"
        "from tarflow_jax.training import Checkpoints\n"
        "fsspec.config.conf['gcs']['requests_timeout'] = 5\n"
        "checkpoints = Checkpoints(epath.Path(sys.argv[1]))\n"
        "checkpoints.save(1, {'bias': np.ones(3, 'float32')}, {'name': 'run'})\n"
        "checkpoints.wait()\n"
        "print(checkpoints.restore({'bias': jax.ShapeDtypeStruct((3,), 'float32')})[0])\n"
        "epath.Path(sys.argv[1], 'late').write_text('')\n"
    )
    number = itertools.count(1)

    def never(request):
        return 3600.0 if "late" in request.name or ("/d/" in request.name and next(number) in (1, 3)) else None

    store.fault = never
    options = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1"}
    code, out, err = commands.run("-c", program, bucket / "checkpoints", **options)
    assert (code, out.strip()) == (1, "1"), err
    assert err.splitlines()[-1].startswith("fsspec.exceptions.FSTimeoutError")
    assert len(store.injected) >= 3


@pytest.mark.parametrize("fault", [503, 429, "cut", "lost", 0.05])
def test_a_failing_store_is_tried_again(store, bucket, impatient, fault):
    rng = random.Random(0)
    store.fault = lambda request: fault if rng.random() < 0.15 else None  # not always the same requests
    checkpoints = Checkpoints(bucket / "checkpoints")
    checkpoints.save(1, STATE, {"name": "run"}, test_loss=0.5)
    checkpoints.wait()
    step, found = checkpoints.restore(SHAPES)
    assert step == 1
    np.testing.assert_array_equal(found["kernel"], STATE["kernel"])
    checkpoints.close()
    writer = MetricsWriter(bucket, 0)
    for step in range(1, 11):
        writer.write(step, {"loss": 0.5})
        writer.flush()
    writer.close()
    assert len((bucket / "metrics.jsonl").read_text().splitlines()) == 10
    assert len(store.injected) > 5


PARTS = ["record/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/ocdbt.process_0"]


@pytest.mark.parametrize("fault", [403, *(pytest.param(each, marks=pytest.mark.slow) for each in (503, "cut"))])
def test_a_checkpoint_that_the_store_does_not_give_out_is_not_damaged(store, bucket, impatient, fault, caplog):
    checkpoints = Checkpoints(bucket / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, STATE, {})
    checkpoints.wait()
    for part in PARTS:
        store.fault = lambda request, part=part: fault if f"2/{part}" in request.name else None
        with pytest.raises(OSError, match=r"could not read gs://bucket/run/checkpoints/2: .*; fix that and run"):
            checkpoints.restore(SHAPES)
    assert "skipping" not in caplog.text
    store.fault = lambda request: None
    assert checkpoints.restore(SHAPES)[0] == 2
    checkpoints.close()


@pytest.mark.parametrize("fault", [403, *(pytest.param(each, marks=pytest.mark.slow) for each in (503, "cut"))])
@pytest.mark.parametrize("part", [*PARTS, "commit_success.txt"])
def test_a_checkpoint_that_the_store_does_not_take_is_one_line_and_earlier_ones_stay(
    store, bucket, impatient, fault, part
):
    checkpoints = Checkpoints(bucket / "checkpoints")
    checkpoints.save(1, STATE, {})
    checkpoints.wait()
    store.fault = lambda request: fault if f"2/{part}" in request.name else None
    checkpoints.save(2, STATE, {})
    with pytest.raises(OSError, match=r"could not write a checkpoint in gs://bucket/run/checkpoints: .*; earlier ones"):
        checkpoints.wait()
    store.fault = lambda request: None
    assert checkpoints.restore(SHAPES)[0] == 1
    checkpoints.save(2, STATE, {})
    checkpoints.wait()
    assert checkpoints.restore(SHAPES)[0] == 2
    checkpoints.close()
