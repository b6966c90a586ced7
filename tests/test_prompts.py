"""Prompts from a text, a list, GenEval's and DPG-Bench's files; and the layouts their evaluators read."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from deco_jax.data import prompts as lib
from deco_jax.errors import UserError

pytestmark = pytest.mark.fast

# As in GenEval's file: the keys' order and the spaces are kept.
GENEVAL = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"prompt":"a photo of two clocks",  "tag": "counting", "include": [{"class": "clock", "count": 2}]}',
    '{"tag": "colors", "prompt": "a café, \\u00e9 both ways"}',
]


@pytest.fixture
def geneval(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(GENEVAL) + "\n", encoding="utf-8")
    return lib.read_prompts(str(file))


@pytest.fixture
def dpg(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in {"COCOval2014000000000520": "A cat,\nsleeping.\n", "12": "  a dog ", "3": "ein Fuß"}.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text("not a prompt")
    return lib.read_prompts(str(folder))


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 12, 3)).astype(np.uint8)


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_one_prompt():
    for text in ("a cat", " a cat\n", "cat.", "a list.txt of cats", "über/unter", "a" * 5000, "nul\0"):
        prompts = lib.read_prompts(text)
        assert (prompts.kind, prompts.prompts, prompts.names) == ("list", [text.strip()], ["00000"])


def test_list(tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeffa cat\r\n\n  \n a dog\u2028and more \n\U0001f98a".encode())
    prompts = lib.read_prompts(str(tmp_path / "list.txt"))
    assert prompts.prompts == ["a cat", "a dog\u2028and more", "\U0001f98a"]
    assert prompts.names == ["00000", "00001", "00002"]
    assert prompts.kind == "list"


def test_geneval(geneval):
    assert geneval.kind == "geneval"
    assert geneval.prompts == ["a photo of a bench", "a photo of two clocks", "a café, é both ways"]
    assert lib.images_a_prompt(geneval) == 4


def test_dpg(dpg):
    assert dpg.kind == "dpg"
    assert dict(zip(dpg.names, dpg.prompts, strict=True)) == {
        "12": "a dog",
        "3": "ein Fuß",
        "COCOval2014000000000520": "A cat,\nsleeping.",
    }
    assert lib.images_a_prompt(dpg) == 4


def test_mistakes(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "1.txt").write_text(" \n")
    for name, data in {
        "none.txt": b"\n \n",
        "none.jsonl": b"\n",
        "latin.txt": "Fuß".encode("latin-1"),
        "image.png": b"",
        "broken.jsonl": GENEVAL[0].encode() + b"\n{'prompt'",
        "other.jsonl": b'{"text": "a"}',
        "list.jsonl": b"[1]",
        "half.jsonl": b'{"prompt": "\\ud83d"}',
    }.items():
        (tmp_path / name).write_bytes(data)
    for spec, message in {
        "": "prompt is empty",
        "  ": "prompt is empty",
        "none.txt": "none.txt holds no prompt",
        "none.jsonl": "none.jsonl holds no prompt",
        "latin.txt": "latin.txt are not UTF-8",
        "image.png": "not a .txt or .jsonl",
        "broken.jsonl": "line 2 of .*broken.jsonl is not JSON",
        "half.jsonl": "line 1 of .*half.jsonl is not JSON text",
        "other.jsonl": "line 1 of .*'prompt'",
        "list.jsonl": "line 1 of .*'prompt'",
        "missing.txt": "no such file of prompts: .*missing.txt",
        "empty": "without .txt files",
        "blank": "1.txt is empty",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            lib.read_prompts(str(tmp_path / spec) if spec.strip() else spec)
        assert "\n" not in str(caught.value)


def test_geneval_s_folders(geneval, tmp_path):
    """Read back as GenEval's evaluate_images.py does: every folder of digits, every file that starts NUMBER.png."""
    out = tmp_path / "images"
    images = noise(4)
    for index in range(3):
        lib.write_images(out, geneval, index, images)
    assert sorted(os.listdir(out)) == ["00000", "00001", "00002"]
    for folder, line in zip(sorted(out.iterdir()), GENEVAL, strict=True):
        assert sorted(os.listdir(folder)) == ["metadata.jsonl", "samples"]
        assert (folder / "metadata.jsonl").read_text(encoding="utf-8") == line + "\n"
        with (folder / "metadata.jsonl").open(encoding="utf-8") as file:
            assert json.load(file)["tag"] in ("single_object", "counting", "colors")
        assert sorted(os.listdir(folder / "samples")) == ["0000.png", "0001.png", "0002.png", "0003.png"]
        for image, expected in zip(sorted((folder / "samples").iterdir()), images, strict=True):
            np.testing.assert_array_equal(read(image), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_dpg_s_grid(dpg, tmp_path, count):
    """Cut as DPG-Bench's compute_dpg_bench.py does, from boxes (left, top, right, bottom) of one image's size."""
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    out = tmp_path / "images"
    lib.write_images(out, dpg, 2, images)
    assert os.listdir(out) == ["COCOval2014000000000520.png"]
    picture = Image.open(out / "COCOval2014000000000520.png")
    assert picture.size == ((16, 16) if count == 1 else (32, 32))
    boxes = [(0, 0, 16, 16), (16, 0, 32, 16), (0, 16, 16, 32), (16, 16, 32, 32)]
    for box, expected in zip(boxes, images, strict=False):
        np.testing.assert_array_equal(np.asarray(picture.crop(box)), expected)


def test_dpg_takes_four(dpg, tmp_path):
    with pytest.raises(UserError, match="5 images a prompt"):
        lib.write_images(tmp_path / "images", dpg, 0, noise(5))
    with pytest.raises(UserError, match="0 images a prompt"):
        lib.check_count(dpg, 0)
    assert not (tmp_path / "images").exists()


def test_a_list_s_files(tmp_path):
    prompts = lib.PromptSet("list", ["a", "b"], lib.numbered(2))
    lib.write_images(tmp_path, prompts, 1, noise(1))
    np.testing.assert_array_equal(read(tmp_path / "00001.png"), noise(1)[0])
    lib.write_images(tmp_path, prompts, 0, noise(3))
    assert sorted(os.listdir(tmp_path)) == ["00000_0.png", "00000_1.png", "00000_2.png", "00001.png"]
    np.testing.assert_array_equal(read(tmp_path / "00000_2.png"), noise(3)[2])
