"""Statistics of Inception features: collected batch by batch, kept on disk between runs, or read from ADM's files.

features -> Accumulator.add ... -> .statistics() -> frechet_distance
                                -> .inception_score(), .pool3() for precision and recall
"""

from __future__ import annotations

import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deco_jax.errors import NPZ_ERRORS, UserError
from deco_jax.evaluation.fid import SPLIT, InceptionScore
from deco_jax.models.inception import NUM_CLASSES, POOL3_WIDTH, SPATIAL_WIDTH, Features, check_images
from deco_jax.run import fetch, files, storage

FORMAT = 1


class Statistics(NamedTuple):
    """Mean and covariance (divided by n - 1) of pool3, and of the spatial features if known; float64."""

    mu: np.ndarray  # [2048]
    sigma: np.ndarray  # [2048, 2048]
    mu_s: np.ndarray | None  # [2023]
    sigma_s: np.ndarray | None  # [2023, 2023]
    num_images: int | None  # number of images behind them; None if the file doesn't say


# --- gathering -------------------------------------------------------------------------------------------------------


class RunningMoments:
    """Mean and covariance of a stream of vectors, in float64 around the first batch's mean to avoid cancellation."""

    def __init__(self, width: int):
        self.count = 0
        self.origin = np.zeros(width)
        self.total = np.zeros(width)
        self.outer = np.zeros((width, width))

    def add(self, vectors: np.ndarray) -> None:
        """Add vectors [n, width]."""
        if not len(vectors):
            return
        x = np.asarray(vectors, np.float64)
        if not self.count:
            self.origin = x.mean(0)
        x = x - self.origin
        self.total += x.sum(0)
        self.outer += x.T @ x
        self.count += len(x)

    def mean(self) -> np.ndarray:
        return self.origin + self.total / self.count

    def covariance(self) -> np.ndarray:
        """Return the covariance [width, width]; needs two vectors."""
        shift = self.total / self.count
        return (self.outer - self.count * np.outer(shift, shift)) / (self.count - 1)


class Accumulator:
    """Everything that the scores need from a set of images, in file order.

    Its memory doesn't depend on the size of the images: 65 MB for moments, and 8 KB per image for pool3 features if
    they are kept for precision and recall.

    fingerprint: the caller's text for what is measured (checkpoint, sampler, seed, data ...), stored with the state so
    that `load` never continues something else.
    """

    def __init__(self, keep_features: bool = True, split: int = SPLIT, fingerprint: str = ""):
        self.fingerprint = fingerprint
        self.moments = RunningMoments(POOL3_WIDTH)
        self.spatial_moments = RunningMoments(SPATIAL_WIDTH)
        self._scores = InceptionScore(NUM_CLASSES, split)
        self._has_classifier: bool | None = None
        self._features: list[np.ndarray] | None = [] if keep_features else None

    @property
    def count(self) -> int:
        """The number of images so far, which is where to continue."""
        return self.moments.count

    def add(self, features: Features, keep: np.ndarray | None = None) -> None:
        """Add the next images' features from a `FeatureExtractor`; keep: bool [n], whose pool3 to keep (all)."""
        has_classifier = features.log_softmax is not None
        if self._has_classifier not in (None, has_classifier):
            raise UserError(
                "these statistics were begun with Inception weights "
                f"{'with' if self._has_classifier else 'without'} a classifier; use the same file, or start again"
            )
        self._has_classifier = has_classifier
        self.moments.add(features.pool3)
        self.spatial_moments.add(features.spatial)
        if features.log_softmax is not None:
            self._scores.add(features.log_softmax)
        if self._features is not None:
            kept = features.pool3 if keep is None else features.pool3[keep]
            self._features.append(np.asarray(kept, np.float32))

    def statistics(self) -> Statistics:
        """Return mean and covariance; raise UserError for fewer than two images."""
        if self.count < 2:
            raise UserError(f"{self.count} images have no covariance; FID needs at least 2 (50,000 is usual)")
        pool3, spatial = self.moments, self.spatial_moments
        return Statistics(pool3.mean(), pool3.covariance(), spatial.mean(), spatial.covariance(), self.count)

    def inception_score(self) -> float | None:
        """Return the Inception Score; None if the weights had no classifier."""
        return self._scores.score() if self._has_classifier else None

    def pool3(self) -> np.ndarray | None:
        """Return the kept features, float32 [kept, 2048] in file order; None if none were to be kept."""
        if self._features is None:
            return None
        self._features = [np.concatenate([np.zeros((0, POOL3_WIDTH), np.float32), *self._features])]
        return self._features[0]

    def save(self, path: str | os.PathLike) -> None:
        """Write the state to an .npz, whole or not at all."""
        state: dict[str, np.ndarray] = {
            "format": np.array(FORMAT),
            "fingerprint": np.array(self.fingerprint),
            "classifier": np.array(-1 if self._has_classifier is None else int(self._has_classifier)),
            "split": np.array(self._scores.split),
            "probabilities": self._scores.probabilities,
            "negative_entropy": self._scores.negative_entropy,
            "counts": self._scores.counts,
        }
        for name, moments in (("pool3", self.moments), ("spatial", self.spatial_moments)):
            state |= {f"{name}_{part}": np.asarray(value) for part, value in vars(moments).items()}
        features = self.pool3()
        if features is not None:
            state["features"] = features
        save_npz(path, state)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Accumulator:
        """Read what `save` wrote; raise UserError if missing or damaged. Compare `.fingerprint` before continuing."""
        try:
            # np.load leaves a damaged file open if it opened it itself
            with storage.path(path).open("rb") as handle, np.load(handle) as file:
                state = {key: file[key] for key in file.files}
            if int(state["format"]) != FORMAT:
                raise ValueError(f"format {state['format']} instead of {FORMAT}")
            self = cls("features" in state, int(state["split"]), str(state["fingerprint"]))
            for name, moments in (("pool3", self.moments), ("spatial", self.spatial_moments)):
                for part, value in vars(moments).items():
                    stored = state[f"{name}_{part}"]
                    if stored.shape != np.shape(value):
                        raise ValueError(f"{name}_{part} has shape {stored.shape}")
                    setattr(moments, part, int(stored) if part == "count" else stored)
            scores = self._scores
            scores.probabilities, scores.negative_entropy = state["probabilities"], state["negative_entropy"]
            scores.counts = state["counts"]
            self._has_classifier = {-1: None, 0: False, 1: True}[int(state["classifier"])]
            if self._features is not None:
                self._features = [state["features"]]
                if len(state["features"]) > self.count:
                    raise ValueError(f"{len(state['features'])} features of {self.count} images")
            return self
        except NPZ_ERRORS as error:
            raise UserError(f"{path}: damaged, or not ours ({_brief(error)}); delete it to start again") from error


def _brief(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def save_npz(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write an uncompressed .npz, through a temporary file in the same folder; raise UserError if that fails."""
    try:
        with files.whole(path, shared=True) as part, part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"can't write {path}: {reason}; free disk space or choose another folder") from error


# --- files -----------------------------------------------------------------------------------------------------------


class NpzImages:
    """The uint8 images [n, height, width, 3] of an .npz in ADM's layout, read in batches (50,000 at 512² are 39 GB)."""

    def __init__(self, path: str | os.PathLike, key: str = "arr_0"):
        self.path, self.key = fetch.local(path), key
        with _open_npz(self.path) as file:
            names = _keys(file)
            if key not in names:
                raise UserError(f"{self.path} has no images {key!r} (uint8 [n, h, w, 3]): it holds {_listing(names)}")
            try:
                with file.open(f"{key}.npy") as member:
                    self.shape, fortran, self.dtype = _header(member)
            except (*NPZ_ERRORS, RuntimeError) as error:
                raise UserError(f"{self.path} is damaged ({_brief(error)}); write it again") from error
        check_images(self, f"{self.path} {key}")
        if fortran:
            raise UserError(f"{self.path} {key}: stored in Fortran order; save np.ascontiguousarray(images)")

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield images start, start + 1, ... in arrays of `size`, the last one shorter; raise UserError if damaged."""
        image = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as file, file.open(f"{self.key}.npy") as member:
                _header(member)
                member.seek(start * image, os.SEEK_CUR)
                for first in range(start, len(self), size):
                    count = min(size, len(self) - first)
                    data = member.read(count * image)
                    if len(data) != count * image:
                        raise EOFError(f"it ends within image {first + len(data) // image}")
                    yield np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])
        except (*NPZ_ERRORS, RuntimeError) as error:
            raise UserError(f"{self.path} is damaged ({_brief(error)}); write it again") from error


class Reference(NamedTuple):
    """A reference file: its statistics (None if it only has images), and its images (None if it has none)."""

    statistics: Statistics | None
    images: NpzImages | None
    warnings: list[str]


def read_reference(path: str | os.PathLike) -> Reference:
    """Read an ADM reference .npz: mu, sigma, mu_s, sigma_s, and arr_0 for precision and recall.

    Either half may be missing: without statistics, take them from the images; without images, there is no precision or
    recall; without mu_s and sigma_s, there is no sFID (`warnings` says so). Anything else raises UserError.
    """
    path = fetch.local(path)
    with _open_npz(path) as file:
        names = _keys(file)
    known = {"arr_0", "mu", "sigma", "mu_s", "sigma_s"}
    if not names & {"arr_0", "mu", "sigma"}:
        raise UserError(f"{path} is not a reference file: it holds {_listing(names)}, expected {_listing(known)}")
    for one, other in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if len(names & {one, other}) == 1:
            raise UserError(f"{path} has {(names & {one, other}).pop()!r} without the other of {one!r} and {other!r}")
    if "mu_s" in names and "mu" not in names:
        raise UserError(f"{path} has 'mu_s' and 'sigma_s' without 'mu' and 'sigma'")
    notes: list[str] = []
    images = NpzImages(path) if "arr_0" in names else None
    if "mu" not in names:
        return Reference(None, images, notes)
    mu, sigma = _moments(path, "mu", "sigma", POOL3_WIDTH)
    if "mu_s" not in names:
        notes.append(f"{path} has no 'mu_s' and 'sigma_s': no sFID")
        return Reference(Statistics(mu, sigma, None, None, None), images, notes)
    return Reference(Statistics(mu, sigma, *_moments(path, "mu_s", "sigma_s", SPATIAL_WIDTH), None), images, notes)


def small_sample_warning(count: int, what: str = "samples") -> str | None:
    """Return a warning about what too few images do to FID; None from 2048 images on."""
    if count >= POOL3_WIDTH:
        return None
    return (
        f"{count} {what} are fewer than the {POOL3_WIDTH} Inception features: the covariance is singular and FID is "
        "too high, the more so the fewer there are; only compare it with FIDs of equally many (50,000 is usual)"
    )


def _open_npz(path: pathlib.Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise UserError(f"no file {path}; give the path of an .npz")
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or not an .npz ({_brief(error)}); write or download it again") from error


def _keys(file: zipfile.ZipFile) -> set[str]:
    return {name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")}


def _listing(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)[:10]) or "nothing"


def _header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the shape, Fortran order and dtype of an .npy stream, which is then at the first value."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(member)
    raise ValueError(f".npy version {version}")


def _moments(path: pathlib.Path, mean_key: str, covariance_key: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as handle, np.load(handle) as file:
            mean, covariance = file[mean_key], file[covariance_key]
    except NPZ_ERRORS as error:
        raise UserError(f"{path} is damaged ({_brief(error)}); download it again") from error
    for key, array, shape in ((mean_key, mean, (width,)), (covariance_key, covariance, (width, width))):
        if array.shape != shape or array.dtype.kind != "f":
            raise UserError(f"{path} {key}: {array.dtype} {array.shape}; expected floating point {shape}")
        if not np.isfinite(array).all():
            raise UserError(f"{path} {key}: holds non-finite values")
    return mean.astype(np.float64), covariance.astype(np.float64)
