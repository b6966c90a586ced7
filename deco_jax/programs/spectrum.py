"""--mode=spectrum: the paper's Fig. 4, the energy by frequency in the outputs of the transformer and the whole model.

For every checkpoint, over images and all sampling steps: the DiT's output map (its tokens laid out as in the image,
channels averaged) and the predicted velocity; for comparison the data and the weights of the frequency loss.
Writes WORKDIR/spectrum.json and WORKDIR/spectrum.png.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from deco_jax import api
from deco_jax.conditioning.requests import data_requests
from deco_jax.config import COMPUTED, to_json
from deco_jax.data import pipeline, sources
from deco_jax.data.transforms import image_sides
from deco_jax.errors import UserError
from deco_jax.evaluation.spectrum import BLOCK, ModelSpectrum, block_energy, normalised_spectrum
from deco_jax.images import to_float
from deco_jax.method.dct import zigzag
from deco_jax.method.losses.frequency import jpeg_weights
from deco_jax.report import style
from deco_jax.run import checkpoint, files, storage
from deco_jax.run.workdir import listed, make_workdir, short_names
from deco_jax.run.writer import write_json


def spectrum(config: ml_collections.ConfigDict, workdir: str, checkpoint_path: str = "") -> None:
    """Measure, print the values at the highest frequency, and write the JSON and the picture."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("drawing the spectrum needs matplotlib; run: pip install matplotlib") from None

    folder = storage.path(workdir)
    named = listed(config.spectrum.checkpoints)
    if named and checkpoint_path:
        raise UserError("--checkpoint and config.spectrum.checkpoints name checkpoints; give one of them")
    read = named or [storage.path(checkpoint_path or workdir)]
    runs = [(name, checkpoint.find(str(where))) for name, where in zip(short_names(read), read, strict=True)]
    stored = [stored_config(where, config) for _, where in runs]
    source = sources.open_source(config.data)
    make_workdir(folder)

    say: Callable[[str], None] = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda text: None
    curves = []
    for (name, where), theirs in zip(runs, stored, strict=True):
        say(f"{config.spectrum.num_images} images from {where} ...")
        energies = model_energies(theirs, where)
        block = len(energies["dit"])
        if block < BLOCK:
            say(f"{name}: its token grid is smaller than a {BLOCK}x{BLOCK} block; its map uses {block}x{block}")
        curves.append(
            {
                "name": name,
                "checkpoint": str(where),
                "model": to_json(theirs)["model"],
                "dit": {"block": block, **_curve(energies["dit"])},
                "velocity": {"block": BLOCK, **_curve(energies["velocity"])},
            }
        )
        say(
            f"{name}: at the highest frequency {curves[-1]['dit']['spectrum'][-1]:.3f} in the DiT's output, "
            f"{curves[-1]['velocity']['spectrum'][-1]:.3f} in the velocity"
        )
    weights = dict(zip(("Y", "Cb", "Cr"), jpeg_weights(config.loss.frequency_quality), strict=True))
    result = {
        "checkpoints": curves,
        "data": {
            "images": min(config.spectrum.num_images, len(source)),
            "block": BLOCK,
            **_curve(data_energy(config, source)),
        },
        "frequency_weights": {
            "quality": config.loss.frequency_quality,
            "block": BLOCK,
            **{name: (w.reshape(-1)[zigzag()] / w.max()).tolist() for name, w in weights.items()},
        },
        "images": config.spectrum.num_images,
        "sample": to_json(config)["sample"],
        "order": "zigzag, lowest first; spectrum = log(1 + energy) / max, energy = mean squared DCT coefficient",
    }
    if jax.process_index() == 0:
        write_json(folder / "spectrum.json", result)
        draw(result, folder / "spectrum.png")
        say(f"wrote {folder / 'spectrum.json'} and {folder / 'spectrum.png'}")


def _curve(energy: np.ndarray) -> dict[str, list[float]]:
    return {
        "energy": np.asarray(energy, np.float64).reshape(-1)[zigzag(len(energy))].tolist(),
        "spectrum": normalised_spectrum(energy).tolist(),
    }


def stored_config(where: pathlib.Path, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return `config` with a checkpoint's model, path and image size; how it is computed stays as `config` says."""
    stored = checkpoint.load_config(where)
    theirs = ml_collections.ConfigDict(config.to_dict())
    computed = {key: config.model[key] for key in COMPUTED if key in config.model and key in stored["model"]}
    theirs.model = ml_collections.ConfigDict(stored["model"] | computed)
    theirs.path = ml_collections.ConfigDict(stored["path"])
    height, width = theirs.data.image_size = tuple(stored["data"]["image_size"])
    if theirs.model.get("class_token"):
        raise UserError(f"{where} also denoises a class token; the spectrum only supports models without one")
    if theirs.model.text_width:
        raise UserError(f"{where} is a text-to-image model; the spectrum only supports class-to-image models")
    if min(height, width) // theirs.model.patch_size < 2:
        raise UserError(f"{where}: {height}x{width} in patches of {theirs.model.patch_size} gives no map of tokens")
    return theirs


def model_energies(config: ml_collections.ConfigDict, where: pathlib.Path) -> dict[str, np.ndarray]:
    """Return a checkpoint's mean energies over config.spectrum.num_images images, as `ModelSpectrum.energies` does."""
    model = api.open_model(config, str(where))
    requests = data_requests(config.sample, model.condition, config.spectrum.num_images)
    return ModelSpectrum(model.generator, requests, model.sampling(config), config, model.mesh).energies(model.params)


def data_energy(config: ml_collections.ConfigDict, source: sources.Source) -> np.ndarray:
    """Return the mean energy [8, 8] of config.spectrum.num_images evenly spaced images in ±1, without flips."""
    count = min(config.spectrum.num_images, len(source))
    batches = pipeline.epoch(
        source,
        image_sides(config.data.image_size),
        batch_size=min(config.spectrum.batch_size, count),
        max_unreadable=config.data.max_unreadable,
        indices=np.arange(count, dtype=np.int64) * len(source) // count,
    )
    energy = jax.jit(lambda images: jnp.sum(block_energy(to_float(images)), axis=0))
    total = np.zeros((BLOCK, BLOCK))
    try:
        for batch in batches:
            total += np.asarray(energy(batch["image"]), np.float64)
    finally:
        batches.close()
    return total / count


def draw(result: dict[str, Any], where: pathlib.Path) -> None:
    """Draw the DiT's outputs on the left, and velocities, data and loss weights on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)

    def line(axes: Any, curve: list[float], **style: Any) -> None:
        axes.plot(np.linspace(0, BLOCK * BLOCK - 1, len(curve)), curve, **style)

    names = style.in_words([run["name"] for run in result["checkpoints"]])
    for i, run in enumerate(result["checkpoints"]):
        block = run["dit"]["block"]
        size = "" if block == BLOCK else f" ({block}×{block})"
        line(left, run["dit"]["spectrum"], **style.curve(i), label=names[i] + size)
        line(right, run["velocity"]["spectrum"], **style.curve(i), label=names[i])
    line(right, result["data"]["spectrum"], color="black", linewidth=3, alpha=0.6, label="data")
    weights = result["frequency_weights"]
    line(right, weights["Y"], color="grey", linestyle=":", label=f"loss weights Y, quality {weights['quality']:g}")
    line(right, weights["Cb"], color="grey", linestyle="-.", label="loss weights Cb, Cr")
    left.set(title="DiT output", xlabel="frequency (zigzag, low to high)", ylabel="log(1 + energy) / maximum")
    right.set(title="predicted velocity, data, loss weights", xlabel="frequency (zigzag, low to high)", ylim=(0, 1.03))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with files.whole(where) as part:
        figure.savefig(part, dpi=150, format="png")
