"""Real scores of real images: 5,000 of CIFAR-10's training set against 5,000 of its test set, through the command line,
against the features that the published TorchScript file computes by itself and scores written down in float64.

    DECO_JAX_INCEPTION=/data/inception-2015-12-05.pt DECO_JAX_CIFAR10=/data/cifar10 \\
        python -m pytest -m slow -n 0 -s tests/test_cifar10.py      # half an hour on one core
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from deco_jax.evaluation.fid import frechet_distance
from deco_jax.evaluation.statistics import Accumulator
from tests.helpers import relative_error
from tests.runs import succeed

torch = pytest.importorskip("torch")
WEIGHTS, DATA = os.environ.get("DECO_JAX_INCEPTION", ""), os.environ.get("DECO_JAX_CIFAR10", "")
COUNT = 5000
NAMES = ("fid", "precision", "recall")


def torchscript_features(files: list[pathlib.Path]) -> np.ndarray:
    """float64 [n, 2048] of the file's own forward pass; the resize to 299 as two matrices."""
    network = torch.jit.load(WEIGHTS).eval()
    resize = np.zeros((299, 32))
    for i in range(299):
        low, share = divmod(i * 32 / 299, 1)
        resize[i, int(low)] += 1 - share
        resize[i, min(int(low) + 1, 31)] += share
    matrix, features = torch.from_numpy(resize), []
    with torch.inference_mode():
        for first in range(0, len(files), 20):
            pixels = np.stack([np.asarray(Image.open(path)) for path in files[first : first + 20]])
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()
            x = ((matrix @ x @ matrix.T - 128) / 128).float()
            features.append(network(x.contiguous(memory_format=torch.channels_last)).double().numpy())
    return np.concatenate(features)


def expected_scores(samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """FID by scipy's sqrtm; precision and recall by all distances, third neighbours, ≤."""
    mean = samples.mean(0) - reference.mean(0)
    ours, theirs = np.cov(samples, rowvar=False), np.cov(reference, rowvar=False)
    fid = mean @ mean + np.trace(ours + theirs - 2 * scipy.linalg.sqrtm(ours @ theirs).real)

    def squared(a, b):
        return (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T

    def radii(a):
        return np.partition(squared(a, a), 3, axis=1)[:, 3]  # the nearest is itself

    apart = squared(samples, reference)
    precision = (apart <= radii(reference)[None]).any(1).mean()
    recall = (apart <= radii(samples)[:, None]).any(0).mean()
    return dict(zip(NAMES, (fid, precision, recall), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not (WEIGHTS and DATA), reason="set DECO_JAX_INCEPTION and DECO_JAX_CIFAR10; neither is shipped")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_set_against_test_set(tmp_path):
    train, test = (
        sorted((pathlib.Path(DATA) / part).rglob("*.png"))[::step] for part, step in (("train", 10), ("test", 2))
    )
    assert len(train) == len(test) == COUNT
    samples = tmp_path / "samples"
    samples.mkdir()
    for path in test:
        shutil.copy(path, samples / f"{path.parent.name}_{path.name}")
    said = succeed(
        "--config=configs/cifar10.py",
        f"--workdir={tmp_path / 'run'}",
        "--mode=evaluate",
        f"--config.data.path={DATA}/train",
        f"--config.evaluate.num_reference={COUNT}",
        "--config.data.num_workers=0",
        f"--config.evaluate.inception={WEIGHTS}",
        f"--config.evaluate.samples={samples}",
        env={"XLA_FLAGS": ""},
        timeout=7200,
    ).stdout
    print(said)
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())

    theirs, reference = torchscript_features(test), torchscript_features(train)
    expected = expected_scores(theirs, reference)
    print("TorchScript, float64:", expected)
    kept = [np.load(tmp_path / "run" / "evaluation" / f"{name}.npz")["features"] for name in ("samples", "reference")]
    assert relative_error(kept[0], theirs) < 1e-4
    assert relative_error(kept[1], reference) < 1e-4
    assert result["fid"] == pytest.approx(expected["fid"], abs=1e-3)
    measured = Accumulator.load(tmp_path / "run" / "evaluation" / "samples.npz").statistics()
    assert abs(frechet_distance(*measured[:2], *measured[:2])) < 1e-3
    for name in NAMES[1:]:
        assert result[name] == pytest.approx(expected[name], abs=1e-3), name
