"""--mode=demo: what the page draws is what --mode=sample draws, in a real browser and without a network."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import quickstart, t2i_256
from deco_jax import api
from deco_jax.conditioning.condition import open_condition
from deco_jax.conditioning.requests import Requests, prompt_requests
from deco_jax.errors import UserError
from deco_jax.models import network as network_lib
from deco_jax.programs import demo
from deco_jax.run import checkpoint, sharding
from deco_jax.sampling import generate
from deco_jax.sampling.settings import Sampling
from tests.helpers import ROOT, browser
from tests.runs import SMOKE, random_checkpoint

EULER = ("--config.sample.sampler=euler", "--config.sample.shift=1.0", "--config.sample.guidance=2.0")
TEXT = "--config=configs/t2i_256.py:smoke"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("digits") / "run", quickstart.get_config("smoke"))


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("captions") / "run", t2i_256.get_config("smoke"))


def asked(**changes) -> demo.Request:
    values = {
        "height": 16,
        "width": 16,
        "count": 2,
        "num_steps": 3,
        "sampler": "euler",
        "guidance": 2.0,
        "shift": 1.0,
        "seed": 5,
    }
    return demo.Request(**values | changes)


def expected(config, workdir, wanted: demo.Request) -> np.ndarray:
    """The same images by the path that --mode=sample takes."""
    mesh = sharding.make_mesh(1, 1)
    network = network_lib.build(config.model.to_dict())
    config.data.image_size = (wanted.height, wanted.width)
    config.sample.update(
        {k: getattr(wanted, k) for k in ("num_steps", "sampler", "guidance", "shift", "seed", "negative_prompt")}
    )
    condition = open_condition(config, mesh, None)
    if wanted.prompt:
        requests = prompt_requests(condition, [wanted.prompt] * wanted.count, wanted.negative_prompt)
    else:
        labels = np.full(wanted.count, wanted.label, np.int32)
        requests = Requests(wanted.count, labels.__getitem__, np.int32(config.model.num_classes))
    params = checkpoint.load_average(checkpoint.find(workdir), network.shapes, config, mesh)
    generator = generate.Generator(generate.make_denoiser(config), mesh)
    return np.concatenate(list(generator.images(params, requests, Sampling.of(config), wanted.count)))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Compiled in two ways, values may round to neighbours."""
    return a.shape == b.shape and bool(np.abs(a.astype(int) - b.astype(int)).max() <= 1)


@contextlib.contextmanager
def served(*arguments: object):
    """The address of the page of a command, which is ended by Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs gradio")
    process = subprocess.Popen(
        [sys.executable, "-m", "deco_jax.main", "--mode=demo", "--port=0", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if match := re.search(r"the demo is at (http://127\.0\.0\.1:\d+); press Ctrl-C to stop it", line):
                yield match[1]
                break
        else:
            raise AssertionError(said)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert said == "ended\n"
    finally:
        process.kill()
        process.communicate()


def drawn(page) -> list[np.ndarray]:
    """Press Draw, wait for the animation, and bring the images as they are served."""
    page.get_by_role("button", name="Draw").click()
    page.locator("#trajectory figcaption", has_text="From noise to image").wait_for(timeout=120_000)
    page.locator("#images img").first.wait_for()
    pictures = []
    for image in page.locator("#images img").all():
        data = page.request.get(image.get_attribute("src")).body()
        with Image.open(io.BytesIO(data)) as file:
            assert file.format == "PNG"
            pictures.append(np.asarray(file.convert("RGB")))
    return pictures


def fill(page, label: str, value: object) -> None:
    field = page.get_by_label(label, exact=True).first
    field.fill(str(value))
    field.press("Tab")


def animated(page) -> Image.Image:
    source = page.locator("#trajectory img").get_attribute("src")
    return Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))


def test_class_to_image_in_a_browser(digits):
    with (
        browser() as open_page,
        served(SMOKE, f"--workdir={digits}", "--config.sample.num_images=2", *EULER) as address,
    ):
        page = open_page(address)
        page.get_by_role("button", name="Draw").wait_for()
        assert "deco, 10 classes, trained at 16×16" in page.content()
        page.get_by_label("Class").click()
        page.get_by_role("option", name="7", exact=True).click()
        fill(page, "number input for Steps", 3)
        fill(page, "Seed", 5)
        pictures = drawn(page)
        images = expected(quickstart.get_config("smoke"), digits, asked(label=7))
        assert len(pictures) == 2
        assert not same(images, expected(quickstart.get_config("smoke"), digits, asked(label=2)))
        for picture, image in zip(pictures, images, strict=True):
            assert same(picture, image.repeat(16, 0).repeat(16, 1))
        with animated(page) as film:
            assert film.format == "WEBP"
            assert film.n_frames == 4  # the noise and three steps
            assert film.size == (2 * 256 + 6, 256 + 4)

        fill(page, "Seed", -1)
        page.get_by_role("button", name="Draw").click()
        page.get_by_text("config.sample.seed=-1 must be from 0 to").first.wait_for()


def test_text_to_image_in_a_browser(captions):
    with browser() as open_page, served(TEXT, f"--workdir={captions}", "--config.sample.num_images=1") as address:
        page = open_page(address)
        page.get_by_role("button", name="Draw").wait_for()
        page.get_by_role("button", name="Draw").click()
        page.get_by_text("a prompt is empty").first.wait_for()
        fill(page, "Prompt", "three <b>")
        fill(page, "Negative prompt", "seven")
        fill(page, "number input for Steps", 2)
        pictures = drawn(page)
        config = t2i_256.get_config("smoke")
        sample = config.sample
        wanted = asked(
            prompt="three <b>",
            negative_prompt="seven",
            height=32,
            width=32,
            count=1,
            num_steps=2,
            sampler=sample.sampler,
            guidance=sample.guidance,
            shift=sample.shift,
            seed=sample.seed,
        )
        (image,) = expected(config, captions, wanted)
        assert same(pictures[0], image.repeat(8, 0).repeat(8, 1))
        (other,) = expected(config, captions, dataclasses.replace(wanted, negative_prompt=""))
        assert not same(image, other)


def test_requests_that_cannot_be(digits):
    model = api.open_model(quickstart.get_config("smoke"), str(digits))
    for changes, says in [
        ({"label": 10}, "there is no class 10; choose one from 0 to 9"),
        ({"label": -1}, "there is no class -1"),
        ({"height": 18}, "patch_size=4 does not divide the image, 18x16"),
        ({"width": 4}, "at least 8 pixels"),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"sampler": "ddim"}, "sampler='ddim' must be one of euler"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"shift": 0.0}, "shift=0.0 must be above 0"),
        ({"seed": 2**31}, "seed 2147483648 is too large"),
        ({"count": 17}, "the page can't show 17 images at once; ask for 1 to 16"),
        ({"count": 0}, "0 images at once"),
    ]:
        with pytest.raises(UserError, match=says) as error:
            next(demo.draw(model, asked(**changes)))
        assert "\n" not in str(error.value)


def test_any_size_that_the_patch_divides(digits):
    """A model draws one size after another; the caller's config stays as it was."""
    config = quickstart.get_config("smoke")
    model = api.open_model(config, str(digits))
    wanted = asked(height=8, width=24, label=2, count=1)
    *_, last = demo.draw(model, wanted)
    assert (config.data.image_size, config.sample.num_steps) == ((16, 16), 4)
    assert same(last.images, expected(config, digits, wanted))


def test_fields_of_the_page():
    fields = {
        "height": 16,
        "width": 16.0,
        "count": 1,
        "num_steps": 5,
        "sampler": "heun",
        "guidance": 3,
        "shift": 1,
        "seed": 7,
    }
    assert demo.read_request(fields) == asked(count=1, num_steps=5, sampler="heun", guidance=3.0, seed=7)
    for empty in (None, "", float("inf")):
        with pytest.raises(UserError, match=r"num steps: .* is not valid"):
            demo.read_request({**fields, "num_steps": empty})


def test_names_of_classes(tmp_path):
    config = quickstart.get_config("smoke")
    workdir = random_checkpoint(tmp_path / "run", config)
    assert demo.class_names(api.open_model(config, workdir)) == [str(digit) for digit in range(10)]
    config.data.source, config.data.path = "image_folder", str(tmp_path / "none")
    assert demo.class_names(api.open_model(config, workdir)) is None
    names = [f"class {i}" for i in range(10)]  # the run's own go before the data's
    (workdir / "classes.json").write_text(json.dumps(names))
    assert demo.class_names(api.open_model(config, workdir)) == names
    (workdir / "classes.json").write_text(json.dumps(names[:9]))
    assert demo.class_names(api.open_model(config, workdir)) is None


def test_animation_has_all_states_or_an_even_choice():
    rng = np.random.default_rng(0)  # frames that are alike would be merged
    states = [rng.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8) for _ in range(101)]
    with Image.open(io.BytesIO(demo.animation(states))) as film:
        assert film.n_frames == demo.MAX_FRAMES
        film.seek(demo.MAX_FRAMES - 1)
        last = np.asarray(film.convert("L"), float)[2:-2, 2:-2].reshape(8, 32, 8, 32).mean((1, 3))
    gray = np.asarray(Image.fromarray(states[-1][0]).convert("L"), float)
    assert np.abs(last - gray).max() < 16
    with Image.open(io.BytesIO(demo.animation(states[:3]))) as film:
        film.seek(2)
        film.load()
        assert film.info["duration"] == 2000


def test_caption_is_escaped():
    assert "<script>" not in demo.figure(b"", "webp", "<script>\"'")


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match='pip install "gradio>=6"'):
        demo.import_gradio()


def test_port():
    with socket.socket() as other:
        other.bind((demo.HOST, 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port={taken} is not available on 127.0.0.1"):
            demo.free_port(taken)
    assert demo.free_port(0) > 0
