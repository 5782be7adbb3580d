"""Models uploaded to a local server that implements the hub's API, and downloaded again; and model cards."""

import base64
import dataclasses
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import huggingface_hub.hf_api
import jax
import numpy as np
import pytest
from PIL import Image

import commands
from tarflow_jax import Noise, TarFlowPipeline, TextToImage
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.interop.tensors import unflatten
from tarflow_jax.runtime.parameters import student_shapes
from tarflow_jax.student import StudentConfig, TrainedStudent
from test_text_to_image import autoencoder, trained  # noqa: F401 (fixtures)
from tiny_models import TINY, random_variables

NAME = "owner/tiny"
SMALL = dataclasses.replace(TINY, num_blocks=1, layers_per_block=1)
COMMIT = "0" * 40
CUT = b"a file whose connection ends early"


class Hub(BaseHTTPRequestHandler):
    """One model, whose files are all small; only requests with the token may write."""

    files: dict[str, bytes]
    made: list[dict]
    address: str

    def log_message(self, *_):
        pass

    def answer(self, code, content=b"", claimed=None, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in (headers | {"Content-Length": claimed or len(body)}).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_token":
            return self.answer(401, {"error": "Invalid credentials\nin two lines"})
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{NAME}", "name": NAME})
        if self.path == f"/api/models/{NAME}/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
            )
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        assert self.path == f"/api/models/{NAME}/commit/main"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del self.files[line["value"]["path"]]
        return self.answer(
            200, {"commitUrl": f"http://{self.headers['Host']}/{NAME}/commit/{COMMIT}", "commitOid": COMMIT}
        )

    def do_GET(self):
        if self.path == f"/api/models/{NAME}":
            if not self.files:
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return self.answer(200, {"id": NAME, "sha": COMMIT, "siblings": []})
        content = self.files.get(self.path.partition(f"/resolve/{COMMIT}/")[2])
        if self.path.startswith(f"/api/models/{NAME}/revision/main"):
            return self.answer(
                200, {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            )
        if self.path.startswith((f"/api/models/{NAME}/tree/{COMMIT}", f"/api/models/{NAME}/tree/main")):
            sizes = {name: len(content) for name, content in self.files.items()}
            return self.answer(200, [{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()])
        if not self.path.startswith(f"/{NAME}/resolve/{COMMIT}/") or content is None:
            return self.answer(404, {"error": "not found"})
        self.close_connection = content == CUT
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        claimed = len(content) + 1000 * (content == CUT)
        return self.answer(200, content, claimed, ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server's class: its files, and the models that were made."""
    kind = type("OneHub", (Hub,), {"files": {}, "made": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = kind.address = f"http://127.0.0.1:{server.server_port}"
    for module in (huggingface_hub.constants, huggingface_hub.hf_api):
        monkeypatch.setattr(module, "ENDPOINT", address, raising=False)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    yield kind
    server.shutdown()
    server.server_close()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def test_a_model_goes_to_the_hub_and_comes_back_the_same(hub, tmp_path, elsewhere):
    variables = random_variables(SMALL)
    student = StudentConfig(SMALL, layers_per_block=(1,))
    weights = {name: np.ones(shape, np.float32) for name, shape in student_shapes(student).items()}
    student = TrainedStudent(student, unflatten(weights), fingerprint(variables))
    pipe = TarFlowPipeline(SMALL, variables, Noise("gaussian", 0.1), student=student)
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / "grid.png")
    card = {"samples": tmp_path / "grid.png"}
    with pytest.raises(ValueError, match=r"did not accept owner/tiny \(.*401.*hf auth login") as caught:
        pipe.push_to_hub(NAME, token="hf_other", card=card)
    assert "\n" not in str(caught.value)
    assert hub.files == {}
    address = pipe.push_to_hub(NAME, private=True, token="hf_token", card=card)
    assert address.endswith(COMMIT)
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("tiny", "owner")
    assert "private" in (made.get("visibility"), *[name for name, value in made.items() if value is True])
    model = ["README.md", "config.json", "model.safetensors", "samples.png"]
    assert sorted(hub.files) == [*model, "student/config.json", "student/model.safetensors"]
    assert "\n# owner/tiny\n" in hub.files["README.md"].decode()
    again = TarFlowPipeline.from_pretrained(NAME)
    for mine, theirs in zip(jax.tree.leaves(pipe.variables), jax.tree.leaves(again.variables), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert again.student.config == student.config
    (elsewhere / NAME / "samples").mkdir(parents=True)  # as launch.sample makes it
    assert TarFlowPipeline.from_pretrained(NAME).config == SMALL
    hub.files["notes.md"] = b"mine"
    TarFlowPipeline(SMALL, random_variables(SMALL, seed=1)).push_to_hub(NAME, token="hf_token")
    assert sorted(hub.files) == ["README.md", "config.json", "model.safetensors", "notes.md"]  # the rest was of others
    with pytest.raises(ValueError, match="'tiny' is not the name of a model on the hub; expected owner/name"):
        pipe.push_to_hub("tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.safetensors": b"other weights"}, r"model\.safetensors does not match the checksum in it"),
        ({"config.json": b'{"architectures": ["Other"]}'}, "it is not a model's of layout version 1; expected"),
        ({"model.safetensors": None}, r"no model\.safetensors in .*; expected a folder that save_pretrained wrote"),
        ({"config.json": None, "model.safetensors": None, "README.md": None, "x.bin": b""}, r"hub has no config\.json"),
        ({"model.safetensors": CUT}, "the hub returned no model of that name .*: .*"),
    ],
)
def test_a_damaged_or_foreign_model_of_the_hub_is_refused_in_one_line(hub, elsewhere, changes, message):
    TarFlowPipeline(SMALL, random_variables(SMALL)).push_to_hub(NAME, token="hf_token")
    hub.files = {name: content for name, content in (hub.files | changes).items() if content is not None}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        TarFlowPipeline.from_pretrained(NAME)
    assert "\n" not in str(caught.value)
    assert not list(elsewhere.iterdir())


@pytest.mark.slow
def test_commands_open_a_pushed_model_elsewhere_and_again_offline(hub, tmp_path, elsewhere):
    TarFlowPipeline(SMALL, random_variables(SMALL), Noise("gaussian", 0.1)).push_to_hub(NAME, token="hf_token")
    command = ("-m", "launch.sample", f"--workdir={NAME}", "--num_images=2")
    options = {"cwd": elsewhere, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    for offline in "01":
        code, out, err = commands.run(*command, HF_HUB_OFFLINE=offline, **options)
        assert code == 0, err
        assert f"{NAME}/samples/samples.png" in out
    code, _, err = commands.run("-m", "launch.sample", "--workdir=owner/none", **options)
    assert code == 1
    assert re.fullmatch("error: no folder owner/none, and the hub returned no model of that name .*\n", err)


@pytest.mark.slow
def test_a_run_over_latents_is_pushed_with_its_autoencoder_and_words(hub, trained):  # noqa: F811
    TextToImage.from_pretrained(trained).push_to_hub(NAME, token="hf_token")
    parts = {"text_to_image.json", "autoencoder/config.json", "text/words.safetensors", "model.safetensors"}
    assert parts <= hub.files.keys()


@pytest.mark.slow
def test_a_card_shows_samples_and_the_figures_of_these_weights_and_its_example_runs(tmp_path, capsys):
    variables = random_variables(SMALL)
    Image.new("L", (30, 20), 77).save(tmp_path / "grid.png")
    results = {"samples": [{"guidance": 0.5, "FID | <b>": 5.123456}], "outliers": {"auroc": 0.9, "edges": [1, 2]}}
    protocol = {"model": "/home/me/runs", "fingerprint": fingerprint(variables), "reference": {"split": "train\n# x"}}
    mine = {"protocol": protocol, "results": results}
    others = {"protocol": {"fingerprint": "0" * 16}, "results": {"bits_per_dim": {"bits/dim": 9.99}}}
    card = {"samples": tmp_path / "grid.png", "evaluations": [mine, others]}
    pipe = TarFlowPipeline(SMALL, variables, Noise("gaussian", 0.1), card=card)
    pipe.save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert "\n![Samples](samples.png)\n" in text
    with Image.open(tmp_path / "model" / "samples.png") as picture:
        assert (picture.size, picture.getpixel((3, 4))) == ((30, 20), (77, 77, 77))
    assert "| guidance | FID \\| &lt;b> |\n| --- | --- |\n| 0.5 | 5.1235 |\n" in text
    assert "| auroc |\n| --- |\n| 0.9 |\n" in text
    assert "| reference, split | train # x |" in text
    assert "9.99" not in text
    assert "/home" not in text

    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example.replace("path/of/this/folder", str(tmp_path / "model")), {})
    assert len(capsys.readouterr().out.split()) >= 16

    pipe.save_pretrained(tmp_path / "model", dtype="bfloat16", card={"samples": None})
    text = (tmp_path / "model" / "README.md").read_text()
    assert "![Samples]" not in text
    assert "auroc" not in text  # of other weights than the rounded ones
    assert not (tmp_path / "model" / "samples.png").exists()
    before = text
    (tmp_path / "grid.png").write_text("no image")
    with pytest.raises(ValueError, match=r"the card's samples, .*grid.png: not an image of .*or None for none"):
        pipe.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == before


def test_saving_needs_no_network(tmp_path, monkeypatch):
    def connect(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    TarFlowPipeline(SMALL, random_variables(SMALL)).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").exists()
