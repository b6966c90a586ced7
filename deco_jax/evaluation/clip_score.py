"""CLIP score: how well images match their captions (Hessel et al. 2021), 100 · max(cosine, 0) on average.

Text-to-image samples have the data's captions; samples of classes have "a photo of a NAME".
"""

from __future__ import annotations

import pathlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from deco_jax.errors import UserError
from deco_jax.evaluation import TITLES
from deco_jax.evaluation.evaluator import Scores, Setup, Subject
from deco_jax.evaluation.image_sets import ImageSet, digest
from deco_jax.evaluation.measuring import FOLDER, Extractor, Newest, Reader, Rows, file_identity, fingerprint_of, read
from deco_jax.models import clip
from deco_jax.models.network import Params, functional
from deco_jax.run import fetch


def cosines(images: jax.Array, texts: jax.Array) -> jax.Array:
    """Return the cosine between the features of each image and its text, [n, width] each: float32 [n]."""
    units = [a / jnp.maximum(jnp.linalg.norm(a, axis=1, keepdims=True), 1e-12) for a in (images, texts)]
    return jnp.sum(units[0] * units[1], axis=1)


class CLIPScore:
    """Scores samples by how well they match their captions."""

    titles: ClassVar = {"clip_score": TITLES["clip_score"]}

    def __init__(self, setup: Setup) -> None:
        folder = pathlib.Path(fetch.local(setup.config.evaluate.clip))
        sizes, image, text = clip.load(folder)
        self._encode = clip.tokenizer(folder, sizes.length)
        self._path = setup.folder / FOLDER / "samples_clip.npz"
        self._weights, self._save_every = f"CLIP {file_identity(folder)}", setup.config.evaluate.save_every
        images = functional(lambda rngs: clip.ImageTower(sizes, rngs=rngs), jnp.float32)
        texts = functional(lambda rngs: clip.TextTower(sizes, rngs=rngs), jnp.float32)

        def score(params: Params, pixels: jax.Array, tokens: jax.Array) -> jax.Array:
            both = images.apply(params["image"], pixels), texts.apply(params["text"], tokens)
            return cosines(*both)[:, None]

        self._newest: Newest[Rows] = Newest()
        self._extractor = Extractor(score, {"image": image, "text": text}, setup.batch_size, setup.mesh)

    def readers(self, samples: ImageSet) -> list[Reader]:
        captions = samples.captions
        if captions is None:
            return []

        def add(rows: Rows, batch: np.ndarray, index: np.ndarray) -> None:
            tokens = self._encode([captions[int(i)] for i in index])
            rows.add(100 * np.maximum(self._extractor(batch, tokens), 0))

        named = fingerprint_of(samples, self._weights, digest("\n".join(captions).encode()))
        return [self._newest(named, lambda: Reader(Rows(1, named), add, self._path, self._save_every))]

    def __call__(self, subject: Subject) -> Scores:
        """Return the mean over a subject's samples."""
        samples = subject.samples
        if samples is None:
            raise UserError("the CLIP score needs samples; give a checkpoint or samples")
        readers = self.readers(samples)
        if not readers:
            return Scores({}, {"clip_score": "the samples have neither captions nor class names"})
        read(samples, readers, self._extractor.batch_size)
        rows = readers[0].state.array()
        return Scores({"clip_score": float(rows.mean(dtype=np.float64))}, notes={"clip_of": {"weights": self._weights}})


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError, with where to get them, if CLIP's files are missing."""
    if not config.evaluate.clip:
        raise UserError(f"config.evaluate.clip is empty; {clip.WHERE}, or leave out clip_score")
    clip.read_sizes(pathlib.Path(fetch.local(config.evaluate.clip)))


def make(setup: Setup) -> CLIPScore:
    """Make the evaluator of config.evaluate.metrics="clip_score"."""
    return CLIPScore(setup)
