"""Prompts to sample from, and the folders that GenEval and DPG-Bench expect their images in.

    a prompt | list.txt | evaluation_metadata.jsonl | folder of NAME.txt  →  PromptSet  →  images in its layout

GenEval (github.com/djghosh13/geneval): 00000/metadata.jsonl, 00000/samples/0000.png, ...: a folder a prompt.
DPG-Bench (github.com/TencentQQGYLab/ELLA): NAME.png, the prompt's images in a grid of two columns without gaps.
A list: 00000.png, or 00000_0.png, 00000_1.png, ... where there are several images a prompt.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from typing import Literal

import numpy as np

from deco_jax import images as images_lib
from deco_jax.errors import UserError
from deco_jax.run import fetch, storage
from deco_jax.run.writer import save_png, write_atomically

GENEVAL_IMAGES = 4  # a prompt
DPG_IMAGES = 4


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts in order. `names[i]` is what prompt i's file or folder is called."""

    kind: Literal["list", "geneval", "dpg"]
    prompts: list[str]
    names: list[str]
    metadata: list[str] = dataclasses.field(default_factory=list)  # of geneval: each prompt's line, as it was

    def __len__(self) -> int:
        return len(self.prompts)


def read_prompts(spec: str) -> PromptSet:
    """Read the prompts that `spec` stands for.

    Args:
        spec: a .txt file (UTF-8, a prompt a line, blank lines skipped); a .jsonl file in GenEval's form, a JSON
            object with the field `prompt` a line; a folder with DPG-Bench's NAME.txt, each file a prompt, in the
            order of the names; any of these in a bucket; anything else is the prompt itself.

    Raises:
        UserError: nothing in it, a file that is missing or can't be read, a line that isn't such an object.
    """
    if not spec.strip():
        raise UserError("the prompt is empty; give a text, a .txt or .jsonl file, or a folder of .txt files")
    if storage.is_remote(spec):
        spec = os.fspath(fetch.local(spec))
    path = pathlib.Path(os.path.expanduser(spec))
    named_as_file = path.suffix.lower() in (".txt", ".jsonl") and not re.search(r"\s", spec)
    try:
        if os.path.isdir(path):  # unlike Path's, false for a text too long to be a name
            return _read_folder(path)
        if os.path.isfile(path):
            if path.suffix.lower() == ".jsonl":
                return _read_geneval(path)
            if path.suffix.lower() == ".txt":
                return _read_list(path)
            raise UserError(f"{path} is a file, but not a .txt or .jsonl of prompts; rename it, or change the prompt")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompts in {path} are not UTF-8 ({error}); save them as UTF-8") from error
    except OSError as error:
        raise UserError(f"the prompts in {path} can't be read: {error.strerror}; check the path") from error
    if named_as_file:
        raise UserError(f"no such file of prompts: {path}; check the path")
    prompt = spec.strip()
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not UTF-8; write it in a terminal that is, or into a .txt file") from error
    return PromptSet("list", [prompt], numbered(1))


def numbered(count: int) -> list[str]:
    """Name prompts 00000, 00001, ..."""
    return [f"{i:05d}" for i in range(count)]


def _read_list(path: pathlib.Path) -> PromptSet:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one a line")
    return PromptSet("list", prompts, numbered(len(prompts)))


def _read_geneval(path: pathlib.Path) -> PromptSet:
    prompts, metadata = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            prompt = values.get("prompt") if isinstance(values, dict) else None
            if isinstance(prompt, str):
                prompt.encode()  # JSON can spell half of a surrogate pair, which is no text
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} of {path} is not JSON text ({error}); mend it") from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"line {number} of {path} is not an object with a text as its 'prompt'; mend it")
        prompts.append(prompt.strip())
        metadata.append(line.rstrip("\r"))
    if not prompts:
        raise UserError(f'{path} holds no prompt; a line is an object such as {{"prompt": "a photo of a bench"}}')
    return PromptSet("geneval", prompts, numbered(len(prompts)), metadata)


def _read_folder(path: pathlib.Path) -> PromptSet:
    files = sorted(file for file in path.glob("*.txt") if not file.name.startswith("."))
    if not files:
        raise UserError(f"{path} is a folder without .txt files; DPG-Bench's prompts are NAME.txt, one a file")
    prompts = [file.read_text(encoding="utf-8-sig").strip() for file in files]
    if "" in prompts:
        raise UserError(f"{files[prompts.index('')]} is empty; write its prompt or remove it")
    return PromptSet("dpg", prompts, [file.stem for file in files])


def images_a_prompt(prompts: PromptSet) -> int:
    """Return how many images of each prompt the benchmark asks for; 1 for a list."""
    return {"geneval": GENEVAL_IMAGES, "dpg": DPG_IMAGES, "list": 1}[prompts.kind]


def image_paths(folder: pathlib.Path, prompts: PromptSet, index: int, count: int) -> list[pathlib.Path]:
    """Return the files for `count` images of prompt `index`: one per image, or one for all (DPG-Bench)."""
    name = prompts.names[index]
    if prompts.kind == "geneval":
        return [folder / name / "samples" / f"{i:04d}.png" for i in range(count)]
    if prompts.kind == "dpg" or count == 1:
        return [folder / f"{name}.png"]
    return [folder / f"{name}_{i}.png" for i in range(count)]


def write_images(folder: pathlib.Path, prompts: PromptSet, index: int, images: np.ndarray) -> None:
    """Write all images of prompt `index` into the layout of its benchmark; each file whole or not at all.

    Args:
        folder: of all prompts; made where it is missing.
        images: uint8 [count, height, width, 3]. DPG-Bench reads at most four, from a grid of two columns; a single
            one is written as it is, and a third leaves the last place black.

    Raises:
        UserError: more images than fit DPG-Bench's grid.
    """
    check_count(prompts, len(images))
    paths = image_paths(folder, prompts, index, len(images))
    if prompts.kind == "dpg":
        save_png(paths[0], dpg_grid(images))
        return
    for path, image in zip(paths, images, strict=True):
        save_png(path, image)
    if prompts.kind == "geneval":
        write_atomically(folder / prompts.names[index] / "metadata.jsonl", (prompts.metadata[index] + "\n").encode())


def check_count(prompts: PromptSet, count: int) -> None:
    """Raise UserError unless the layout takes `count` images per prompt."""
    if count < 1 or (prompts.kind == "dpg" and count > DPG_IMAGES):
        raise UserError(f"{count} images a prompt: DPG-Bench reads 1 to {DPG_IMAGES}, the others at least 1")


def dpg_grid(images: np.ndarray) -> np.ndarray:
    """Tile uint8 [1 to 4, height, width, 3] where DPG-Bench cuts them out: two columns, row by row, no gaps."""
    if len(images) == 1:
        return images[0]
    blank = np.zeros((DPG_IMAGES - len(images), *images.shape[1:]), np.uint8)
    return images_lib.grid(np.concatenate([images, blank]), columns=2, gap=0)
