"""evaluation/fid.py and evaluation/statistics.py: scores, streaming, resuming, reference files."""

from __future__ import annotations

import re
import zipfile

import numpy as np
import pytest
import scipy.linalg

from deco_jax.errors import UserError
from deco_jax.evaluation.fid import InceptionScore, frechet_distance, inception_score
from deco_jax.evaluation.statistics import (
    Accumulator,
    NpzImages,
    RunningMoments,
    read_reference,
    save_npz,
    small_sample_warning,
)
from deco_jax.models.inception import Features
from tests.helpers import golden, relative_error

pytestmark = pytest.mark.fast


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def by_sqrtm(mu1, sigma1, mu2, sigma2):
    return np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * scipy.linalg.sqrtm(sigma1 @ sigma2).real)


def by_data(x, y):
    """tr (S1 S2)^½ is the nuclear norm of the product of the centred data, whatever the rank."""
    a, b = x - x.mean(0), y - y.mean(0)
    root = np.linalg.norm(a @ b.T, "nuc") / np.sqrt((len(a) - 1) * (len(b) - 1))
    traces = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + traces - 2 * root


# --- Fréchet distance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlated", [False, True])
def test_against_sqrtm(correlated):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 48)), rng.normal(0.2, 1.3, (300, 48))
    if correlated:
        x, y = x @ rng.normal(size=(48, 48)), y @ rng.normal(size=(48, 48)) * np.geomspace(1, 1e-3, 48)
    expected = by_sqrtm(*moments(x), *moments(y))
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(*moments(y), *moments(x)) == pytest.approx(expected, rel=1e-7)


def test_closed_form_of_diagonals():
    a, b = np.array([4.0, 9, 0, 1]), np.array([1.0, 0, 0, 25])
    expected = 5 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_distance(np.zeros(4), np.diag(a), np.array([1.0, 0, 2, 0]), np.diag(b)) == pytest.approx(expected)


def test_fewer_images_than_features():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(200, 200)) * np.geomspace(1, 1e-2, 200)
    x, y = rng.normal(size=(30, 200)) @ mix, rng.normal(size=(50, 200)) @ mix
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(by_data(x, y), rel=1e-9)
    assert abs(frechet_distance(*moments(x), *moments(x))) < 1e-9 * np.trace(np.cov(x, rowvar=False))


def test_real_features():
    """100 + 100 of CIFAR-10 through the real network: 48 features by sqrtm, 256 (of rank 99) by the data."""
    x, y = (golden("inception_features")[name][:, :256].astype(np.float64) for name in ("train", "test"))
    few = x[:, :48], y[:, :48]
    expected = by_sqrtm(*moments(few[0]), *moments(few[1]))
    assert frechet_distance(*moments(few[0]), *moments(few[1])) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(by_data(x, y), rel=1e-6)
    assert abs(frechet_distance(*moments(x), *moments(x))) < 1e-6


def test_statistics_that_cannot_be_compared():
    mu, sigma = np.zeros(3), np.eye(3)
    for wrong in ((np.zeros(4), np.eye(4)), (mu, np.eye(4)), (mu, np.zeros((3, 4)))):
        with pytest.raises(UserError, match="different features"):
            frechet_distance(mu, sigma, *wrong)
    with pytest.raises(UserError, match="non-finite"):
        frechet_distance(mu, sigma, mu, sigma * np.nan)


# --- Inception Score -------------------------------------------------------------------------------------------------


def softmax(rng, n, classes):
    p = np.exp(rng.normal(0, 2, (n, classes)))
    return p / p.sum(1, keepdims=True)


def test_inception_score_by_hand():
    p = softmax(np.random.default_rng(0), 23, 7)
    scores = []
    for part in (p[:10], p[10:20], p[20:]):
        scores.append(np.exp(np.mean([scipy.stats.entropy(row, part.mean(0)) for row in part])))
    assert inception_score(p, split=10) == pytest.approx(np.mean(scores), rel=1e-12)
    assert inception_score(p[::-1], split=10) != pytest.approx(np.mean(scores), rel=1e-6)  # order matters


def test_inception_score_limits():
    assert inception_score(np.eye(6), split=6) == pytest.approx(6)  # certain and even; zero probabilities
    assert inception_score(np.full((9, 6), 1 / 6)) == pytest.approx(1)
    scorer = InceptionScore(6)
    scorer.add(np.full((4, 6), -1e4))  # underflows wholly: 0 log 0 is 0
    assert np.isfinite(scorer.negative_entropy).all()
    with pytest.raises(UserError, match="no images"):
        InceptionScore(6).score()
    with pytest.raises(UserError, match="at least 1"):
        InceptionScore(6, split=0)


@pytest.mark.parametrize("batch", [1, 4, 7, 50])
def test_inception_score_streams(batch):
    p = softmax(np.random.default_rng(0), 43, 5)
    scorer = InceptionScore(5, split=10)
    for i in range(0, 43, batch):
        scorer.add(np.log(p[i : i + batch]))
    assert scorer.score() == pytest.approx(inception_score(p, split=10), rel=1e-12)


# --- streaming -------------------------------------------------------------------------------------------------------


def test_moments_far_from_zero():
    """A mean 1e6 times the spread: plain sums of squares would lose all digits."""
    x = np.random.default_rng(0).normal(1e6, 1, (101, 6))
    running = RunningMoments(6)
    for part in np.array_split(x, 8):
        running.add(part)
    running.add(x[:0])
    assert relative_error(running.mean(), x.mean(0)) < 1e-15
    assert relative_error(running.covariance(), np.cov(x, rowvar=False)) < 1e-9


def batches(classifier=True):
    rng = np.random.default_rng(0)
    for n in (5, 1, 6):
        pool3, spatial = (rng.gamma(0.5, 1, (n, width)).astype(np.float32) for width in (2048, 2023))
        yield Features(pool3, spatial, np.log(softmax(rng, n, 1008)).astype(np.float32) if classifier else None)


def test_accumulator():
    every, all_at_once = Accumulator(split=5), [np.concatenate(a) for a in zip(*batches(), strict=True)]
    for features in batches():
        every.add(features)
    assert every.count == 12
    np.testing.assert_array_equal(every.pool3(), all_at_once[0])
    statistics = every.statistics()
    assert statistics.num_images == 12
    for actual, expected in zip(statistics, [*moments(all_at_once[0]), *moments(all_at_once[1])], strict=False):
        assert relative_error(actual, expected) < 1e-6  # NumPy's mean of float32 is the less exact
    assert every.inception_score() == pytest.approx(inception_score(np.exp(all_at_once[2]), split=5), rel=1e-6)


@pytest.mark.parametrize("keep_features", [True, False])
def test_resume_is_exact(tmp_path, keep_features):
    path = tmp_path / "new folder" / "state.npz"
    straight, resumed = (Accumulator(keep_features, split=4, fingerprint="step 7 ε") for _ in range(2))
    for features in batches():
        straight.add(features)
        resumed.add(features)
        resumed.save(path)
        resumed = Accumulator.load(path)
        assert resumed.fingerprint == "step 7 ε"
    assert resumed.count == straight.count == 12
    for actual, expected in zip(resumed.statistics(), straight.statistics(), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert resumed.inception_score() == straight.inception_score()
    if keep_features:
        np.testing.assert_array_equal(resumed.pool3(), straight.pool3())
    else:
        assert resumed.pool3() is None
    assert [file.name for file in path.parent.iterdir()] == ["state.npz"]


def test_no_classifier_no_score(tmp_path):
    accumulator = Accumulator(keep_features=False)
    assert accumulator.inception_score() is None
    for features in batches(classifier=False):
        accumulator.add(features)
    assert accumulator.inception_score() is None
    accumulator.save(tmp_path / "a.npz")
    with pytest.raises(UserError, match="without a classifier; use the same file"):
        Accumulator.load(tmp_path / "a.npz").add(next(batches()))


def test_too_few_for_a_covariance():
    with pytest.raises(UserError, match="0 images have no covariance"):
        Accumulator().statistics()


def test_damaged_state(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(UserError, match="delete it to start again"):
        Accumulator.load(path)
    Accumulator(keep_features=False).save(path)
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2], whole[:5000] + b"\1" * 5000 + whole[10000:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged, or not ours") as error:
            Accumulator.load(path)
        assert "\n" not in str(error.value)
    save_npz(path, {"mu": np.zeros(3)})
    with pytest.raises(UserError, match="damaged, or not ours"):
        Accumulator.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    save_npz(path, {"a": np.arange(3)})

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="No space left on device; free disk space"):
        save_npz(path, {"a": np.arange(4)})
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
    assert len(np.load(path)["a"]) == 3
    with pytest.raises(UserError, match="can't write"):
        save_npz(path / "b.npz", {"a": np.arange(4)})


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adm():
    """The five arrays of an ADM reference."""
    rng = np.random.default_rng(0)
    arrays = {"arr_0": rng.integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)}
    for end, width in (("", 2048), ("_s", 2023)):
        arrays |= {f"mu{end}": rng.normal(size=width), f"sigma{end}": np.eye(width)}
    return arrays


@pytest.mark.parametrize("compressed", [False, True])
def test_images_come_in_batches(tmp_path, adm, compressed):
    path, images = tmp_path / "a.npz", adm["arr_0"]
    (np.savez_compressed if compressed else np.savez)(path, arr_0=images, arr_1=np.arange(7))
    file = NpzImages(path)
    assert len(file) == 7
    assert file.shape == (7, 4, 5, 3)
    for start in (0, 2, 7):
        parts = list(file.batches(3, start))
        assert [len(part) for part in parts] == {0: [3, 3, 1], 2: [3, 2], 7: []}[start]
        np.testing.assert_array_equal(np.concatenate([images[:0], *parts]), images[start:])


def test_reference(tmp_path, adm):
    path = tmp_path / "a.npz"
    np.savez(path, **adm)
    reference = read_reference(path)
    for actual, key in zip(reference.statistics, ("mu", "sigma", "mu_s", "sigma_s"), strict=False):
        np.testing.assert_array_equal(actual, adm[key])
    assert reference.statistics.num_images is None
    assert len(reference.images) == 7
    assert reference.warnings == []

    np.savez(path, arr_0=adm["arr_0"])
    assert read_reference(path).statistics is None

    np.savez(path, mu=adm["mu"].astype(np.float32), sigma=adm["sigma"])
    reference = read_reference(path)
    assert reference.images is None
    assert reference.statistics.mu_s is None
    assert reference.statistics.mu.dtype == np.float64
    assert "no sFID" in reference.warnings[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keep": ["x"], "x": np.zeros(3)}, "is not a reference file: it holds 'x', expected 'arr_0', 'mu', 'mu_s'"),
        ({"keep": []}, "it holds nothing"),
        ({"keep": ["mu", "mu_s", "sigma_s"]}, "has 'mu' without the other of 'mu' and 'sigma'"),
        ({"keep": ["mu", "sigma", "sigma_s"]}, "has 'sigma_s' without the other"),
        ({"keep": ["arr_0", "mu_s", "sigma_s"]}, "without 'mu' and 'sigma'"),
        ({"mu": np.zeros(192)}, "mu: float64 (192,); expected floating point (2048,)"),
        ({"sigma_s": np.eye(2048)}, "sigma_s: float64 (2048, 2048); expected floating point (2023, 2023)"),
        ({"mu": np.zeros(2048, int)}, "mu: int64 (2048,)"),
        ({"mu": np.full(2048, np.inf)}, "mu: holds non-finite values"),
        ({"mu": np.array([None])}, "is damaged"),
        ({"arr_0": np.zeros((7, 4, 5, 3), np.float32)}, "arr_0: float32 values; the Inception network takes uint8"),
        ({"arr_0": np.zeros((7, 3, 4, 5), np.uint8)}, "arr_0: shape (7, 3, 4, 5); expected [images, height, width, 3]"),
        ({"arr_0": np.zeros((7, 4, 5), np.uint8)}, "arr_0: shape (7, 4, 5)"),
        ({"arr_0": np.asfortranarray(np.zeros((7, 4, 5, 3), np.uint8))}, "Fortran order"),
    ],
)
def test_bad_references(tmp_path, adm, change, message):
    path = tmp_path / "a.npz"
    arrays = {**adm, **change}
    keep = arrays.pop("keep", list(arrays))
    np.savez(path, **{key: arrays[key] for key in keep})
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_reference(path)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path, adm):
    path = tmp_path / "a.npz"
    for function in (read_reference, NpzImages):
        with pytest.raises(UserError, match="no file"):
            function(path)
    path.write_bytes(b"nonsense")
    for function in (read_reference, NpzImages):
        with pytest.raises(UserError, match=r"damaged or not an \.npz"):
            function(path)
    np.savez(path, images=adm["arr_0"])
    with pytest.raises(UserError, match=re.escape("no images 'arr_0' (uint8 [n, h, w, 3]): it holds 'images'")):
        NpzImages(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0.npy", b"nonsense")
    with pytest.raises(UserError, match="is damaged"):
        NpzImages(path)
    np.savez(path, arr_0=adm["arr_0"])
    damaged = bytearray(path.read_bytes())
    damaged[300] ^= 1  # one bit of an image
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="is damaged"):
        list(NpzImages(path).batches(3))


def test_warning_of_few_images():
    assert small_sample_warning(2048) is None
    warning = small_sample_warning(500)
    assert "500 samples are fewer than the 2048" in warning
    assert "too high" in warning
