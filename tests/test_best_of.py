"""The search over averages, guidance, intervals and steps, and evaluators that share one pass over the samples."""

from __future__ import annotations

import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
import torch

from configs import meanflow_cifar10, quickstart
from deco_jax.errors import UserError
from deco_jax.evaluation.evaluator import Scores
from deco_jax.evaluation.image_sets import ImageSet
from deco_jax.evaluation.measuring import Reader, Rows, read
from deco_jax.models import network as network_lib
from deco_jax.programs import best_of
from deco_jax.programs.evaluate import evaluate
from deco_jax.run import checkpoint, storage
from tests.buckets import large_puts, needs_gcs, upload
from tests.runs import SMOKE, succeed


def settings(**changes):
    config = quickstart.get_config("smoke")
    config.evaluate.update(changes)
    return config


def described(config) -> list[tuple]:
    sampled = [candidate.sample for candidate in best_of.candidates(config)]
    return [(s.average, s.guidance, s.guidance_interval, s.num_steps) for s in sampled]


def test_combinations():
    config = settings(averages=("ema,short",), guidances=(1.0, 2.0), guidance_intervals=([0.1, 1], (0, 0.5)))
    config.sample.num_steps = 7
    assert described(config) == [
        (average, guidance, interval, 7)
        for average in ("ema", "short")
        for guidance, interval in ((1.0, (0.1, 1.0)), (2.0, (0.1, 1.0)), (2.0, (0.0, 0.5)))
    ]
    assert len(described(settings(steps=(1, 2)))) == 2
    assert not best_of.wanted(settings())


def test_a_combination_that_cannot_be_drawn_is_refused_before_the_first(monkeypatch):
    model = types.SimpleNamespace(name="run")
    evaluators = [types.SimpleNamespace(titles=("fid",))]
    monkeypatch.setattr(checkpoint, "average_names", lambda path: ["ema"])
    config = settings(steps=(4, 1), search_images=10)
    best_of.check(config, model, evaluators)
    config.sample.guidance_rule = "zero_star"  # whose first step waits
    with pytest.raises(UserError, match=r"guidance_zero_steps=1 leaves none of config.sample.num_steps=1"):
        best_of.check(config, model, evaluators)
    learnt = meanflow_cifar10.get_config("dit-smoke")
    learnt.evaluate.update({"guidances": (2.0, 99.0), "search_images": 10})
    with pytest.raises(UserError, match=r"guidance=99.0 is outside of what this model learns"):
        best_of.check(learnt, model, evaluators)


def test_rows_that_a_search_has_not_come_to_are_kept(tmp_path, monkeypatch):
    """It may be stopped before, or search others; and nothing is measured twice, unless the reference is another."""
    model = types.SimpleNamespace(name="run", config=settings())
    config = settings(guidances=(1.0, 2.0, 3.0), search_images=10)
    measured = []

    def scores_of(model, candidate):
        measured.append(candidate.sample.guidance)
        if candidate.sample.guidance == 1.5:
            raise KeyboardInterrupt
        return Scores({"fid": candidate.sample.guidance})

    best_of.search(config, model, tmp_path, scores_of, "a reference")
    config.evaluate.guidances = (1.0, 1.5, 2.5)
    with pytest.raises(KeyboardInterrupt):
        best_of.search(config, model, tmp_path, scores_of, "a reference")
    config.evaluate.guidances = (3.0, 2.0)
    best, _ = best_of.search(config, model, tmp_path, scores_of, "a reference")
    assert measured == [1.0, 2.0, 3.0, 1.5]
    assert best.sample.guidance == 2.0
    assert [row["guidance"] for row in json.loads((tmp_path / "best_of.json").read_text())["rows"]] == [3.0, 2.0]
    best_of.search(config, model, tmp_path, scores_of, "another reference")
    assert measured == [1.0, 2.0, 3.0, 1.5, 3.0, 2.0]


def test_table_is_sorted_and_names_the_best():
    rows = [
        {"key": str(i), "average": "ema", "guidance": g, "interval": [0.1, 1], "steps": 50, "images": 4, "scores": s}
        for i, (g, s) in enumerate([(1.0, {"fid": 9.0, "recall": 0.5}), (2.0, {"fid": 3.0, "recall": 0.25})])
    ]
    result = {"best_by": "fid", "rows": rows, "best": "1", "evaluation": {"fid": 2.5, "recall": None, "images": 50000}}
    assert best_of.table(result).splitlines() == [
        "| average | guidance | interval | steps | FID | recall |",
        "| --- | --- | --- | --- | --- | --- |",
        "| ema | 2 | (0.1, 1] | 50 | 3.0000 | 0.2500 |",
        "| ema | 1 |  | 50 | 9.0000 | 0.5000 |",
        "",
        "4 samples each.",
        "",
        "ema, guidance 2 in (0.1, 1], 50 steps, 50,000 samples: FID 2.5000.",
    ]


def test_readers_share_a_pass_and_go_on_where_each_of_them_was(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (11, 2, 2, 3), dtype=np.uint8)
    drawn: list[int] = []

    def batches(size, first):
        for start in range(first, len(images), size):
            drawn.append(start)
            yield images[start : start + size]

    samples = ImageSet("samples", "of a test", len(images), (2, 2), batches)

    def reader(name, scale, stop=10**9):
        def add(rows, batch, index):
            if index[-1] >= stop:
                raise KeyboardInterrupt
            rows.add(np.concatenate([scale * batch.reshape(len(batch), -1).astype(np.float32), index[:, None]], axis=1))

        return Reader(Rows(13, f"times {scale}"), add, tmp_path / f"{name}.npz", save_every=4)

    with pytest.raises(KeyboardInterrupt):  # the first has saved its 8 images by then, the second 4
        read(samples, [reader("a", 1), reader("b", 2, stop=7)], 4, quiet=True)
    drawn.clear()
    readers = [reader("a", 1), reader("b", 2)]
    assert [each.count for each in readers] == [8, 4]
    read(samples, readers, 4, quiet=True)
    assert drawn == [4, 8]
    for each, scale in zip(readers, (1, 2), strict=True):
        rows = each.state.array()
        np.testing.assert_array_equal(rows[:, :12], scale * images.reshape(11, -1).astype(np.float32))
        np.testing.assert_array_equal(rows[:, 12], np.arange(11))
    drawn.clear()
    read(samples, [reader("a", 1), reader("b", 2)], 4, quiet=True)
    assert drawn == []
    assert reader("a", 3).count == 0  # something else isn't continued


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two averages that draw different images, and weights for Inception."""
    from tests.test_inception import random_state_dict

    folder = tmp_path_factory.mktemp("best_of")
    torch.save(
        {key: torch.from_numpy(np.asarray(a)) for key, a in random_state_dict().items()}, folder / "inception.pth"
    )
    config, rng = settings(), np.random.default_rng(0)
    shapes = network_lib.build(config.model.to_dict()).shapes

    def weights(path, leaf):
        return np.asarray((path[-1].key == "scale") + 0.1 * rng.standard_normal(leaf.shape), np.float32)

    ema, short = (jax.tree_util.tree_map_with_path(weights, shapes) for _ in range(2))
    checkpoints = checkpoint.Checkpoints(folder / "run", 1)
    state = {"step": np.int32(1), "skipped": np.int32(0), "params": {"denoiser": ema}}
    checkpoints.save(1, {**state, "averages": {"ema": ema, "short": short}}, config)
    checkpoints.wait()
    checkpoints.close()
    return folder


# KID, not FID: that takes seconds of linear algebra for each combination.
KID = {"num_reference": 6, "batch_size": 6, "metrics": "kid", "kid_subsets": 2, "best_by": "kid"}


@pytest.mark.slow
def test_as_a_command(run, tmp_path, capsys):
    folder, inception = run / "run", str(run / "inception.pth")
    said = succeed(
        SMOKE,
        "--mode=evaluate",
        f"--workdir={folder}",
        f"--config.evaluate.inception={inception}",
        *(f"--config.evaluate.{name}={value}" for name, value in KID.items()),
        "--config.evaluate.averages=ema,short",
        "--config.evaluate.guidances=1.0,3.0",
        "--config.evaluate.search_images=4",
        "--config.sample.num_images=6",
        "--config.sample.batch_size=6",
        "--config.sample.num_steps=2",
    ).stdout
    result = json.loads((folder / "best_of.json").read_text())
    rows = result["rows"]
    expected = [("ema", 1.0), ("ema", 3.0), ("short", 1.0), ("short", 3.0)]
    assert [(row["average"], row["guidance"]) for row in rows] == expected
    assert len({row["scores"]["kid"] for row in rows}) == 4
    best = min(rows, key=lambda row: row["scores"]["kid"])
    assert result["best"] == best["key"]
    assert len(re.findall(r"^6 of 6 images measured.*data digits", said, re.M)) == 1  # the reference once
    assert said.count("4 of 4 images measured") == 4
    evaluation = json.loads((folder / "evaluation.json").read_text())
    drawn = evaluation["config"]["sample"]
    assert (drawn["average"], drawn["guidance"]) == (best["average"], best["guidance"])
    assert evaluation["samples"]["images"] == 6
    assert (folder / "best_of.md").read_text().startswith("| average | guidance")
    assert "6 samples: KID" in (folder / "best_of.md").read_text()
    assert (folder / "best_of.png").read_bytes().startswith(b"\x89PNG")

    # The best one's settings by themselves.
    config = settings(inception=inception, **KID)
    config.sample.num_images, config.sample.batch_size, config.sample.num_steps = 6, 6, 2
    alone = config.copy_and_resolve_references()
    alone.sample.average, alone.sample.guidance = best["average"], best["guidance"]
    evaluate(alone, str(tmp_path), str(folder / "checkpoints" / "1"))
    assert json.loads((tmp_path / "evaluation.json").read_text())["kid"] == pytest.approx(evaluation["kid"], rel=1e-3)

    # Cut off after three rows: these are taken as they are, the last is measured.
    kept = [{**row, "scores": {"kid": 1e300}} for row in rows[:3]]
    (folder / "best_of.json").write_text(json.dumps({"best_by": "kid", "rows": kept}))
    config.evaluate.averages, config.evaluate.guidances, config.evaluate.search_images = ("ema,short",), (1.0, 3.0), 4
    capsys.readouterr()
    evaluate(config, str(folder))
    assert capsys.readouterr().out.count("4 of 4 images measured") == 1
    again = json.loads((folder / "best_of.json").read_text())
    assert again["rows"][:3] == kept
    assert again["rows"][3]["scores"]["kid"] == pytest.approx(rows[3]["scores"]["kid"], rel=1e-3)
    assert again["best"] == rows[3]["key"]


@pytest.mark.slow
@needs_gcs
@large_puts
def test_a_run_of_a_bucket_is_searched_as_on_a_disk(here, run, tmp_path):
    """With the weights and the cache there, and then samples from there."""
    where, inception = upload(here, run / "run", "run"), "gs://bucket/inception.pth"
    here.upload("inception.pth", (run / "inception.pth").read_bytes())
    here.upload("run/checkpoints/1/commit_success.txt", b"Checkpoint commit was successful")
    shutil.copytree(run / "run", tmp_path / "run")
    searched = {"averages": ("ema,short",), "guidances": (1.0, 3.0), "search_images": 4}
    for workdir, weights, cache in (
        (where, inception, "gs://bucket/cache"),
        (str(tmp_path / "run"), str(run / "inception.pth"), str(tmp_path / "cache_here")),
    ):
        config = settings(**{**KID, **searched}, inception=weights, cache=cache)
        config.sample.num_images, config.sample.batch_size, config.sample.num_steps = 6, 6, 2
        evaluate(config, workdir)
    ours, theirs = (
        json.loads(data) for data in (here.files["run/best_of.json"], (tmp_path / "run/best_of.json").read_bytes())
    )
    assert [row["scores"] for row in ours["rows"]] == [row["scores"] for row in theirs["rows"]]
    assert len(ours["rows"]) == 4
    assert here.files["run/best_of.png"].startswith(b"\x89PNG")
    assert {name for name in here.names("cache/") if name.endswith(".npz")}

    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    here.upload("images.npz", (tmp_path / "images.npz").read_bytes())
    scores = []
    for workdir, samples in (
        ("gs://bucket/measured", "gs://bucket/images.npz"),
        (tmp_path / "measured", tmp_path / "images.npz"),
    ):
        config = settings(**KID, inception=inception, samples=str(samples), reference=str(samples))
        evaluate(config, str(workdir))
        scores.append(json.loads((storage.path(str(workdir)) / "evaluation.json").read_text())["kid"])
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_what_cannot_be_searched(run, tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    weights = str(run / "inception.pth")
    cases = [
        ({"averages": ("ema", "long")}, "has no average 'long'; it has ema, short"),
        ({"samples": str(tmp_path / "images.npz"), "steps": (1, 2)}, "so there is no choice of how to draw them"),
        ({"steps": (1, 2), "best_by": "kid"}, "best_by=kid is not measured by config.evaluate.metrics=adm"),
        ({"steps": (1, 2), "search_images": 11}, "num_images=10 is less than config.evaluate.search_images=11"),
        ({"metrics": "fd_dinov2"}, "config.evaluate.dinov2 is empty; download DINOv2's.*dinov2_vitl14_pretrain.pth"),
    ]
    for changes, says in cases:
        with pytest.raises(UserError, match=says) as error:
            evaluate(settings(inception=weights, **changes), str(run / "run"))
        assert "\n" not in str(error.value)
