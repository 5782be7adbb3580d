"""The report: a complete page that loads nothing and escapes whatever a run directory contains."""

import base64
import hashlib
import io
import json
import os
import re
import zlib
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import commands
from configs import digits
from configs.defaults import with_flow
from configs.student import digits as student_digits
from launch import report_page
from launch.report_page import MAX_POINTS, Run, chart, page, text_of
from tarflow_jax.training import Recipe

HOSTILE = """</script><script>alert(1)</script><img src=x onerror="alert(2)">'"&<!-- https://evil.example \ud800"""
VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """The tags of a page, and its text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.headings, self.raw, self.open = [], [], [], {}, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs))
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.raw[self.open[-1]] = data
        else:
            self.words.append(data)
            if self.open[-1:] == ["h2"]:
                self.headings.append(data)

    def find(self, name, /, **wanted):
        return [a for tag, a in self.tags if tag == name and all(a.get(key) == value for key, value in wanted.items())]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def rendered(workdir):
    """Renders a workdir's page and checks what must hold of every page."""
    run = Run(workdir)
    text = page(run)
    text.encode()  # fails for lone surrogates, which JSON may contain
    found = Page(text)
    for tag, attributes in found.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "a", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("href", "style", "srcset", "action")
            if name == "src":
                content = base64.b64decode(re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", value)[2], validate=True)
                with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
                    image.load()
                    assert not image.info.get("comment")
    assert (len(found.find("script")), len(found.find("style"))) == (1, 1)
    (policy,) = [a["content"] for a in found.find("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    hashes = {tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for tag, text in found.raw.items()}
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'"
    )
    assert not re.search(r"(url\(|@import|fetch|https?:|//[a-z])", found.raw["style"] + found.raw["script"])
    return run, found


def save_picture(path, size=(64, 48), **options):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, "PNG", **options)


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def workdir(tmp_path):
    """The files of a run, made without training."""
    folder = tmp_path / "digits"
    Recipe(digits.get_config("smoke")).write_to(folder)
    lines = [
        {"step": s, "loss": 2.0 - s / 10, "block_norms": [1.0, 0.5], "images_per_second": 32.0} for s in range(1, 21)
    ] + [{"step": 20, "test_loss": 0.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "results.json", {"test loss (nats/dim, less ½ log 2π)": 0.25})
    write_json(folder / "data.json", {"fingerprint": "0", "label_names": ["zero", "one"]})
    for name in ("step_0000010", "step_0000020", "samples_guided", "samples_raw", "trajectory"):
        save_picture(folder / "figures" / f"{name}.png")
    samples = [{"guidance": w, "denoised": True, "FID": 5.123456} for w in (0.0, 1.0)]
    protocol = {"data_set": "digits", "split": "test", "seed": 3, "reference": {"num_images": 60000}}
    evaluation = {"protocol": protocol, "results": {"samples": samples}, "environment": {"jax": "0.10.2"}}
    write_json(folder / "evaluation" / "fid-test-01234567.json", evaluation)
    write_json(folder / "starts.jsonl", {"step": 0, "time": "2026-11-26T10:00:00+00:00", "processor": "Abacus 9000"})
    return folder


def test_a_report_has_all_that_a_run_left(workdir):
    run, found = rendered(workdir)
    assert run.notes == []
    assert len(found.find("img")) == 5
    assert found.headings == [
        "Samples", "Samples during training", "From latents to images", "Curves", "Evaluation", "Recipe",
        "Machine and versions",
    ]  # fmt: skip
    for text in (
        "20", "0.2500", "1.1689", "fid", "5.1235", "data_set digits, split test, seed 3",
        "reference.num_images 60,000", "jax 0.10.2", "Classes: zero, one", "begun, 2026-11-26", "Abacus 9000",
        "block 1 0.5", "training 0 ", "test split 0.25", "num_steps 20", "step 20", "tarflow_jax 0.",
    ):  # fmt: skip
        assert text in found.text
    # 20 steps of 32 images, or as many as the recipe has, at 32 images a second.
    minutes = 20 * run.recipe.config.train.batch_size / 32 / 60
    assert f"{minutes:.1f} minutes" in found.text
    (slider,) = found.find("input")
    assert slider["type"] == "range"
    assert len(found.find("polyline")) == 4  # loss, two blocks, speed
    assert len(found.find("circle")) == 1  # a single test loss
    viewport = found.find("meta", name="viewport")[0]["content"]
    assert viewport == "width=device-width, initial-scale=1"
    assert "prefers-color-scheme: dark" in found.raw["style"]


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    Recipe(digits.get_config("smoke")).write_to(tmp_path)
    run, found = rendered(tmp_path)
    assert run.notes == []
    assert "0 of 20" in found.text
    assert not found.find("img")
    with pytest.raises(FileNotFoundError, match="expected the workdir of a training run"):
        Run(tmp_path / "nothing")


def test_hostile_contents_are_escaped(workdir, tmp_path):
    content = {HOSTILE: HOSTILE, "list": [HOSTILE, [1], {}], "deep": {HOSTILE: {HOSTILE: HOSTILE}}, "none": None}
    evaluation = {"protocol": content, "results": {HOSTILE: content, "samples": [content, 3, "x"]}, "environment": 3}
    write_json(workdir / "evaluation" / "<b>x&amp;.json", evaluation)
    write_json(workdir / "starts.jsonl", content | {"step": HOSTILE, "time": HOSTILE})
    write_json(workdir / "data.json", {"label_names": [HOSTILE]})
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["source"] = HOSTILE
    write_json(workdir / "config.json", config)
    hostile_name = workdir.with_name("<script>alert(3)<")
    workdir.rename(hostile_name)
    _, found = rendered(hostile_name)
    assert found.text.count("<script>alert(1)</script>") >= 8
    assert "<script>alert(3)<" in found.text
    assert {"b", "x"}.isdisjoint(tag for tag, _ in found.tags)


def test_pictures_are_embedded_as_nothing_but_pixels(workdir, tmp_path):
    figures = workdir / "figures"
    note = PngImagePlugin.PngInfo()
    note.add_text("comment", "SECRET")
    save_picture(figures / "samples_raw.png", pnginfo=note)
    (figures / "trajectory.png").write_text("<svg onload=alert(1)>")
    (figures / "step_0000010.png").unlink()
    (figures / "step_0000010.png").symlink_to(tmp_path / "private.png")
    save_picture(tmp_path / "private.png")
    os.mkfifo(figures / "step_0000015.png")
    content = bytearray((figures / "step_0000020.png").read_bytes())
    content[16:24] = b"\0\1\0\0" * 2  # 65536 x 65536 pixels, it says
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (figures / "step_0000020.png").write_bytes(content)
    (figures / "step_<b>.png").write_text("not asked for")
    run, found = rendered(workdir)
    assert len(found.find("img")) == 2
    assert not run.previews
    assert "SECRET" not in str(base64.b64decode(run.pictures["samples_raw"].partition(",")[2]))
    reasons = dict(note.split(".png: ") for note in run.notes)
    assert reasons["figures/trajectory"].startswith("not an image")
    assert reasons["figures/step_0000010"] == "a link out of the workdir"
    assert reasons["figures/step_0000015"] == "not a regular file"
    assert "pixels" in reasons["figures/step_0000020"]
    assert "step_0000020.png: " in found.text  # the page says so too


def test_sizes_are_limited(workdir, monkeypatch):
    for step in range(100):
        save_picture(workdir / "figures" / f"step_{step:07d}.png", (8, 8))
    run, found = rendered(workdir)
    steps = list(run.previews)
    assert len(steps) == report_page.MAX_PREVIEWS
    assert (steps[0], steps[-1]) == (0, 99)
    assert run.notes == ["figures: 76 of 100 previews"]
    save_picture(workdir / "figures" / "samples_guided.png", (3200, 400))
    monkeypatch.setattr(report_page, "MAX_EMBEDDED_BYTES", 3 * 2**20)
    run, _ = rendered(workdir)
    large = run.pictures["samples_guided"]
    assert large.startswith("data:image/jpeg")  # noise does not compress
    assert len(large) < 2**20 * 2
    with Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))) as image:
        assert image.size == (1600, 200)
    monkeypatch.setattr(report_page, "MAX_JSON_BYTES", 200)
    monkeypatch.setattr(report_page, "MAX_EMBEDDED_BYTES", 0)
    monkeypatch.setattr(report_page, "MAX_METRICS_BYTES", 10)
    run, found = rendered(workdir)
    assert (run.series, run.evaluations, run.pictures, run.previews) == ({}, {}, {}, {})
    assert "evaluation/fid-test-01234567.json: " in found.text


def test_damaged_files_are_left_out_with_a_note(workdir):
    (workdir / "results.json").write_text("[1, 2]")
    (workdir / "data.json").write_text('{"label_names": "abc"}')
    (workdir / "starts.jsonl").write_bytes(b'\xff\xfe\n{"step": 1}\n[]\n')
    (workdir / "evaluation" / "deep.json").write_text('{"results": {"a": ' + '{"a":' * 300 + "1" + "}" * 302)
    (workdir / "evaluation" / "deeper.json").write_text("[" * 100_000)
    (workdir / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN, "a": 1e300, "b": true, "c": "x", "d": {}, "grad_norm": [1, [2]]}\n'
        '{"step": true, "loss": 1}\n{"step": -1, "loss": 1}\n{"step": 1e3, "loss": 1}\n{"step": 7, "loss": 3}\n{"st'
    )
    run, _ = rendered(workdir)
    assert run.series == {"loss": [(7, 3.0)], "grad_norm/0": [(1, 1.0)]}
    assert run.starts == [{"step": 1}]
    assert sorted(note.split(":")[0] for note in run.notes) == [
        "evaluation/deeper.json", "metrics.jsonl", "results.json", "starts.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["metrics.jsonl", "figures/samples_raw.png", "evaluation/fid-test-01234567.json"])
def test_no_damage_stops_a_report(workdir, damage, name):
    for _ in damage(workdir / name, 20):
        assert "</html>" in page(Run(workdir))


def test_a_student_s_report_counts_the_student_s_parameters(tmp_path):
    recipe = Recipe(with_flow(student_digits.get_config("smoke"), digits.get_config("smoke")))
    recipe.write_to(tmp_path)
    variables = jax.eval_shape(recipe.task.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert f"parameters {count:,}" in rendered(tmp_path)[1].text


def curve(points):
    drawn = chart({"loss": points}, {"loss": "training"})
    return drawn, np.array(drawn["curves"][0]["points"])


def test_curves_are_where_their_axes_say():
    drawn, found = curve([(step, -2 + step / 1000) for step in range(0, 3001, 100)])
    assert (found[:, 0] >= 58).all()
    assert (found[:, 0] <= 430).all()
    values, steps = dict(drawn["y_ticks"]), dict(drawn["x_ticks"])
    assert list(steps) == ["0", "1k", "2k", "3k"]
    for i, name in enumerate(("-2", "-1", "0", "1")):
        assert found[10 * i, 1] == pytest.approx(values[name], abs=0.1)
        assert found[10 * i, 0] == pytest.approx(list(steps.values())[i], abs=0.1)


def test_the_page_draws_curves_and_axes_at_these_pixels(workdir):
    run, found = rendered(workdir)
    drawn = chart(run.series, {"block_norms": "block "})
    assert [curve["label"] for curve in drawn["curves"]] == ["block 0 1", "block 1 0.5"]
    for i, curve in enumerate(drawn["curves"]):
        lines = [line["points"].split() for line in found.find("polyline", **{"class": f"c{i}"})]
        assert [f"{x},{y}" for x, y in curve["points"]] in lines
    for _, y in drawn["y_ticks"]:
        assert found.find("line", x1="58", x2="430", y1=str(y), y2=str(y))
    lines = [{"step": step, "block_norms": [1.0] * 9} for step in (1, 2)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, many = rendered(workdir)
    assert [line["class"] for line in many.find("polyline")] == [*(f"c{i}" for i in range(8)), "c0 dashed"]


def test_long_curves_are_averaged_and_outliers_cut(workdir):
    _, found = curve([(step, np.sin(step)) for step in range(MAX_POINTS)])
    assert len(set(found[:, 0])) == MAX_POINTS
    drawn, found = curve([(step, float(step % 3)) for step in range(3 * MAX_POINTS)])
    assert len(found) == MAX_POINTS
    np.testing.assert_allclose(found[:, 1], found[0, 1])
    assert drawn["averaged"] == 3
    drawn, found = curve([(step, 1e6 if step == 5 else np.sin(step)) for step in range(100)])
    assert np.ptp(found[6:, 1]) > 40
    assert drawn["hidden"] == 1
    assert chart({"other": [(1, 1.0)]}, {"loss": ""}) is None
    for constant in (0.0, 1e-9, -3e20):
        curve([(1, constant), (2, constant)])
    lines = [{"step": step, "loss": 1e6 if step == 5 else 1.0} for step in range(3 * MAX_POINTS)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, page_of_long_run = rendered(workdir)
    assert "Points are means of up to 3 values. 1 points lie far outside" in page_of_long_run.text


def test_cells():
    assert [text_of(value) for value in (1 / 3, 12345678, 9999, True, None, [1, 0.5], float("nan"), "x" * 999)] == [
        "0.33333", "12,345,678", "9999", "yes", "unknown", "1, 0.5", "nan", "x" * 300 + "…",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_writes_the_page_and_lists_what_it_left_out(workdir, tmp_path):
    output = tmp_path / "new" / "page.html"
    (workdir / "figures" / "trajectory.png").write_text("x")
    code, out, err = commands.run("-m", "launch.report", f"--workdir={workdir}", f"--output={output}")
    assert (code, out) == (0, f"{output}\n")
    assert err.startswith("left out: figures/trajectory.png: not an image")
    assert "Abacus 9000" in Page(output.read_text()).text
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


@pytest.mark.slow
def test_the_command_replaces_files_only(workdir, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for output in ("pipe", "digits"):
        code, out, err = commands.run("-m", "launch.report", f"--workdir={workdir}", f"--output={tmp_path / output}")
        assert (code, out) == (1, "")
        assert err == f"error: --output={tmp_path / output} is a folder or a device; expected a file\n"
    assert (tmp_path / "pipe").is_fifo()
