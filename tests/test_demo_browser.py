"""The demo in a browser, as a visitor sees it."""

import io
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

import browser
import commands
from lazy import Lazy
from runs import SMALL
from tarflow_jax import Noise, TarFlowPipeline
from tarflow_jax.likelihood import bits_per_dim
from tiny_models import random_variables

pytestmark = [pytest.mark.slow, browser.needs_chromium]
playwright = Lazy("playwright.sync_api")
TIMEOUT_MS = 120_000


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a demo that runs."""
    folder = tmp_path_factory.mktemp("models") / "tiny <b>flow"
    TarFlowPipeline(SMALL, random_variables(SMALL), Noise("gaussian", 0.1)).save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ("-m", "launch.demo", f"--workdir={folder}", f"--port={port}", "--num_images=4")
    server = commands.start(*arguments)
    try:
        lines = [server.stdout.readline() for _ in range(2)]
        assert lines == ["drawing the first 4 images\n", f"http://127.0.0.1:{port}\n"], server.communicate()[1]
        yield lines[1].strip()
    finally:
        server.terminate()
        _, errors = server.communicate(timeout=60)
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def chromium():
    with browser.open_browser() as opened:
        yield opened


@pytest.fixture
def page(chromium, address):
    """The demo's page, which asks no other host for anything."""
    page = chromium.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    playwright.expect.set_options(timeout=TIMEOUT_MS)
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url) if request.url.startswith("http") else None)
    page.goto(address)
    playwright.expect(samples(page)).to_have_count(4)
    yield page
    page.close()
    assert {url for url in hosts if not url.startswith(address)} == set()


def samples(page):
    return page.locator("[role=tabpanel]:visible .thumbnail-item img")


def sources(page):
    return [image.get_attribute("src") for image in samples(page).all()]


def upload(page, tab, *files):
    page.get_by_role("tab", name=tab).click()
    places = page.locator("[role=tabpanel]:visible input[type=file]").all()
    for place, (name, content) in zip(places, files, strict=True):
        place.set_input_files({"name": name, "mimeType": "image/png", "buffer": content})


def png(seed=0):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)).save(content, "PNG")
    return content.getvalue()


def test_the_page_tells_of_the_model_and_draws(page):
    playwright.expect(page.locator("h1")).to_have_text("TarFlow tiny <b>flow")
    playwright.expect(page.locator(".facts")).to_contain_text("4 × 6 × 3")
    before = sources(page)
    page.get_by_role("button", name="Next seed").click()
    playwright.expect(page.get_by_label("Seed")).to_have_value("1")
    playwright.expect(samples(page).first).not_to_have_attribute("src", before[0])
    assert len(sources(page)) == 4
    page.get_by_role("tab", name="Watch it emerge").click()
    playwright.expect(samples(page)).to_have_count(SMALL.num_blocks + 2)  # latents, blocks, denoised
    assert page.locator(".film img").first.get_attribute("src").startswith("data:image/gif")


def test_an_upload_gets_its_log_p_and_a_broken_file_a_message_of_one_line(page):
    upload(page, "Ask", ("photo.png", png()))
    figures = page.locator(".figures")
    playwright.expect(figures).to_contain_text("log p(x)")
    log_prob, bits = (float(text.replace(",", "")) for text in figures.locator("b").all_inner_texts()[:2])
    np.testing.assert_allclose(bits, bits_per_dim(log_prob, SMALL.num_dims), atol=2e-3)
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    playwright.expect(figures).to_have_count(0)
    upload(page, "Ask", ("broken.png", png()[:100]))
    message = page.get_by_test_id("toast-body")
    playwright.expect(message).to_contain_text("damaged image")
    assert "Traceback" not in message.inner_text()
    playwright.expect(figures).to_have_count(0)


def test_a_caller_of_the_api_reads_no_other_files_of_the_server(address):
    url, path = f"{address}/gradio_api/call/ask", str(Path(__file__).with_name("data") / "README.md")
    event = requests.post(url, json={"data": [{"path": path}, -1, 0.1]}, timeout=60).json()["event_id"]
    answer = requests.get(f"{url}/{event}", timeout=60).text.split()
    assert answer[:2] == ["event:", "error"]
    assert "expected an uploaded image" in json.loads(" ".join(answer[3:]))["error"]


def test_the_page_fits_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 640})
    for tab in ("Draw", "Watch it emerge", "Ask"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360, tab
