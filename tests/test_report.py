"""--mode=report: what the page says is what the files say, and nothing in a file or on the page reaches outside."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from configs import quickstart
from deco_jax.config import flatten, to_json
from deco_jax.errors import UserError
from deco_jax.programs.report import report
from deco_jax.report.history import enlargement
from deco_jax.run.workdir import short_names
from tests.helpers import browser, run_main
from tests.runs import SMOKE, rows, succeed, two_steps

EVIL = "</script><img src=x onerror=alert(1)>\"'&<!--DATA-->"
VOID = {"meta", "link", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """Elements with their attributes, tables as lists of rows, and the numbers that the script draws."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text, self._open, self._json = "", [], ""
        self.feed(text)
        self.close()
        assert self._open == []
        self.data = json.loads(self._json)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self._open[-1] if self._open else ("", {})
        if attributes.get("type") == "application/json":
            self._json += data
        elif tag in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif tag not in ("script", "style"):
            self.text += data + " "

    def find(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for name, a in self.elements if name == tag and attributes.items() <= a.items()]

    def row(self, title: str) -> list[str]:
        """The cells of the first row of that title."""
        return next(row[1:] for table in self.tables for row in table if row[0] == title)


def picture(image: dict[str, str | None]) -> np.ndarray:
    head, data = (image["src"] or "").split(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as file:
        return np.asarray(file)


def write_run(folder, name, *, steps=(2, 4, 6), grids=(), evil="", **settings):
    """A workdir as a run leaves it, with numbers that can be worked out."""
    run = folder / name
    (run / "samples").mkdir(parents=True)
    lines = [
        {
            "step": s,
            "loss": 10.0 / s,
            "pixel": None if s == steps[1] else 3.0 / s,
            "gradient_norm": s / 7,
            "images_per_second": 100.0 + s,
            "unreadable_images": 3,
            evil or "frequency": 7.0 / s,
        }
        for s in steps
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = quickstart.get_config("smoke")
    config.update_from_flattened_dict(settings)
    (run / "config.json").write_text(json.dumps({**to_json(config), **({"note": evil} if evil else {})}))
    for step in grids:
        Image.fromarray(small_grid(step).repeat(5, 0).repeat(5, 1)).save(run / "samples" / f"step_{step:08d}.png")
    return run


def small_grid(step):
    return np.random.default_rng(step).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def write_report(workdir, *runs, **settings) -> Page:
    config = quickstart.get_config("smoke")
    config.report.workdirs = ",".join(map(str, runs))
    config.report.update(settings)
    report(config, str(workdir))
    text = (workdir / "report.html").read_text()
    assert not [path.name for path in workdir.iterdir() if path.suffix == ".part"]
    return Page(text)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The page of two runs, one of which has everything."""
    folder = tmp_path_factory.mktemp("runs")
    a = write_run(folder, "a", grids=(2, 4, 6), evil=EVIL)
    b = write_run(folder, "b", steps=(4, 8, 12), grids=(8,), **{"model.width": 64, "data.batch_size": 32})
    evaluation = {
        "fid": 12.25,
        "sfid": None,
        "inception_score": None,
        "precision": 0.5,
        "recall": 0.25,
        "missing": {"inception_score": EVIL, "sfid": "no 'mu_s'"},
        "warnings": ["too few: " + EVIL],
        "samples": {"from": "drawn from " + EVIL, "images": 1234},
        "reference": {"from": "digits", "images": None},
        "config": {"sample": {"sampler": "heun", "num_steps": 9, "guidance": 1.5}},
    }
    (a / "evaluation.json").write_text(json.dumps(evaluation))
    curve = np.linspace(1, 0, 64).tolist()
    spectrum = {
        "checkpoints": [
            {"name": EVIL, "dit": {"block": 4, "spectrum": [1.0] * 16}, "velocity": {"block": 8, "spectrum": curve}}
        ],
        "data": {"spectrum": [0.5] * 64},
        "frequency_weights": {"quality": 85, "Y": curve, "Cb": [0.25] * 64},
    }
    for run in (a, b):
        (run / "spectrum.json").write_text(json.dumps(spectrum))
    with (b / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "loss": 0.')  # a run that is writing
    return folder, write_report(folder / "out", a, b)


def test_the_numbers_are_those_of_the_metrics(full):
    _, page = full
    a, b = page.data["runs"]
    assert (a["name"], b["name"]) == ("a", "b")
    assert (a["steps"], b["steps"]) == ([2, 4, 6], [4, 8, 12])
    np.testing.assert_allclose(a["metrics"]["loss"], [5, 2.5, 10 / 6], rtol=1e-8)
    assert a["metrics"]["pixel"] == [1.5, None, 0.5]
    np.testing.assert_allclose(a["metrics"][EVIL], [3.5, 1.75, 7 / 6], rtol=1e-8)
    assert page.data["losses"] == ["loss", EVIL, "pixel", "frequency", "gradient_norm"]
    assert page.row("last loss") == ["1.667 at step 6", "0.8333 at step 12"]
    assert page.row("steps") == ["6 of 4", "12 of 4"]
    assert page.row("images seen") == ["96", "384"]
    assert page.row("images per second, median") == ["104", "108"]
    assert page.row("seconds per step, median") == [f"{16 / 104:.4g}", f"{32 / 108:.4g}"]
    assert page.row("unreadable images") == ["3", "3"]
    assert "a: 1 logged value is not finite" in page.text
    assert "b: 1 damaged line of metrics.jsonl left out" in page.text


def test_differences_and_all_settings(full):
    _, page = full
    differences, everything = (table[1:] for table in page.tables[-2:])
    assert sorted(differences) == [
        ["data.batch_size", "16", "32"],
        ["model.width", "32", "64"],
        ["note", json.dumps(EVIL), "no such setting"],
    ]
    settings = {row[0]: row[1] for row in everything}
    expected = flatten({**to_json(quickstart.get_config("smoke")), "note": EVIL})
    assert settings == {key: json.dumps(value) for key, value in expected.items()}


def test_grids_are_there_pixel_by_pixel(full):
    _, page = full
    images = page.find("img")
    assert [image["data-step"] for image in images] == ["2", "4", "6", "8"]
    for image in images:
        np.testing.assert_array_equal(picture(image), small_grid(int(image["data-step"] or 0)))
        assert (image["width"], image["height"], image["class"]) == ("100", "60", "pixels")
        assert image["alt"]
    assert ["hidden" in image for image in images] == [True, True, False, False]
    (slider,) = page.find("input", id="time")
    assert (slider["type"], slider["min"], slider["max"], slider["value"]) == ("range", "0", "3", "3")
    assert page.data["sample_steps"] == [2, 4, 6, 8]


def test_scores_and_what_is_missing(full):
    _, page = full
    assert page.row("FID") == ["12.25"]
    assert page.row("sFID") == ["no 'mu_s'"]
    assert page.row("Inception Score") == [EVIL]
    assert page.row("recall") == ["0.25"]
    assert page.row("samples") == [f"1,234 (drawn from {EVIL})"]
    assert page.row("sampling")[0].startswith("sampler heun, num steps 9, guidance 1.5")
    assert page.row("lowest FID while training") == ["no FID was measured"] * 2
    assert page.row("peak memory per device") == ["not reported by the device"] * 2
    assert "b: no evaluation.json" in page.text


def test_a_validation_loss_is_a_score(tmp_path):
    """Nothing was drawn for it, so nothing of what is measured on samples is missing."""
    (tmp_path / "run").mkdir()
    values = {"validation_loss": 0.5, "validation_pixel": 0.25, "weights": {"from": "run", "average": "ema"}}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(values))
    page = write_report(tmp_path / "run")
    assert page.row("validation loss") == ["0.5"]
    assert page.row("validation pixel") == ["0.25"]
    assert page.row("sampling") == ["no images"]
    assert "Inception Score" not in page.text


def test_imported_weights_that_were_only_measured(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"fid": 1.625}))
    trained = write_run(tmp_path, "trained")
    page = write_report(tmp_path / "out", tmp_path / "run", trained)
    assert page.row("steps") == ["none trained here", "6 of 4"]
    assert page.row("FID, --mode=evaluate")[0] == page.row("FID")[0] == "1.625"
    assert "run: no metrics: nothing was trained in this workdir" in page.text
    assert write_report(tmp_path / "run").row("last loss") == ["no finite loss was logged"]


def test_what_a_sweep_measured_of_each_run(tmp_path):
    """launch/sweep.py --measure leaves its evaluations in folders of their own, below the run that it trained."""
    runs = [write_run(tmp_path, name) for name in ("a", "b")]
    for run, where, fid in ((0, "guidance=1.5", 126.25), (0, "guidance=1.0", 130.5), (1, "guidance=1.0", 99.0)):
        (runs[run] / where).mkdir()
        (runs[run] / where / "evaluation.json").write_text(json.dumps({"fid": fid}))
    (runs[1] / "guidance=1.5").mkdir()
    (runs[1] / "guidance=1.5" / "evaluation.json").write_text('{"fid": ')
    page = write_report(tmp_path / "out", *runs)
    (table,) = (table for table in page.tables if table[1][0] == "FID")
    assert table[0][1:] == ["a guidance=1.0", "a guidance=1.5", "b guidance=1.0"]
    assert table[1][1:] == ["130.5", "126.2", "99"]
    assert page.row("FID, --mode=evaluate") == ["130.5 (guidance=1.0), 126.2 (guidance=1.5)", "99 (guidance=1.0)"]
    assert "b: guidance=1.5/evaluation.json can't be read" in page.text
    assert "no evaluation.json" not in page.text


def test_spectra_of_both_in_one_plot(full):
    _, page = full
    dit, velocity = page.data["spectra"]
    assert [(c["name"], c["run"]) for c in dit["curves"]] == [("a (4×4)", 0), ("b (4×4)", 1)]
    assert [c["name"] for c in velocity["curves"]] == [
        "a",
        "b",
        "data",
        "loss weights Y, quality 85",
        "loss weights Cb, Cr",
    ]
    np.testing.assert_allclose(velocity["curves"][1]["values"], np.linspace(1, 0, 64), atol=1e-5)


def test_nothing_from_a_file_is_markup_and_nothing_is_loaded(full):
    folder, page = full
    text = (folder / "out" / "report.html").read_text()
    assert "http:" not in text
    assert "https:" not in text
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "data"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)
    assert len(page.find("script")) == 2
    (policy,) = page.find("meta", **{"http-equiv": "Content-Security-Policy"})
    assert (policy["content"] or "").startswith("default-src 'none'")
    assert len({a["id"] for _, a in page.elements if "id" in a}) == sum("id" in a for _, a in page.elements)
    for link in page.find("a"):
        assert page.find("section", id=(link["href"] or "")[1:])


def test_a_bare_run_says_what_it_has_not(tmp_path):
    run = write_run(tmp_path, "run")
    (run / "config.json").unlink()
    page = write_report(run)
    for says in (
        "No grids of samples",
        "No FID was measured while training",
        "No spectrum was measured",
        "No config.json",
        "No evaluation.json",
    ):
        assert says in page.text
    assert page.row("model") == ["not known"]
    assert not page.find("img")


def test_damaged_files_are_named(tmp_path):
    run = write_run(tmp_path, "run", grids=(2, 4))
    (run / "config.json").write_text("[1]")
    (run / "evaluation.json").write_text('{"fid": ')
    (run / "spectrum.json").write_text('{"checkpoints": [{"name": "x"}]}')
    (run / "samples" / "step_00000002.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    page = write_report(run)
    for name in ("config.json", "evaluation.json", "step_00000002.png"):
        assert f"{name} can't be read" in page.text
    assert "spectrum.json is not as --mode=spectrum writes it" in page.text
    assert [image["data-step"] for image in page.find("img")] == ["4"]


def test_a_spectrum_that_is_not_finite_is_left_out(tmp_path):
    run = write_run(tmp_path, "run", grids=(2,))
    curve = [1.0] * 63 + [float("nan")]
    spectrum = {
        "checkpoints": [
            {"name": "x", "dit": {"block": 4, "spectrum": [1.0] * 16}, "velocity": {"block": 8, "spectrum": curve}}
        ],
        "data": {"spectrum": [0.5] * 64},
        "frequency_weights": {"quality": 85, "Y": [1.0] * 64, "Cb": [0.25] * 64},
    }
    (run / "spectrum.json").write_text(json.dumps(spectrum))
    assert "spectrum.json is not as --mode=spectrum writes it" in write_report(run).text


def test_many_and_large_grids_stay_small(tmp_path):
    run = write_run(tmp_path, "run", grids=range(1, 31))
    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "samples" / "grid.png")
    page = write_report(run, grids=4, grid_pixels=150)
    images = page.find("img")
    assert [image.get("data-step") for image in images] == ["1", "11", "20", "30", None]
    assert "4 of 30 grids" in page.text
    assert picture(images[-1]).shape == (150, 100, 3)
    assert "embedded smaller than they are" in page.text


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_enlargement(factor):
    pixels = small_grid(0)
    assert enlargement(pixels.repeat(factor, 0).repeat(factor, 1)) == factor
    assert enlargement(pixels.repeat(factor, 0)) == 1


def test_short_names(tmp_path):
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "other"]
    assert short_names(folders) == ["x/run", "y/run", f"{tmp_path.name}/other"]
    assert short_names(folders[1:]) == ["run", "other"]


def test_no_metrics(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("\n")
    good = write_run(tmp_path, "good")
    for runs, says in [
        ([tmp_path / "none"], "no such workdir: .*none"),
        ([tmp_path], "has no metrics.jsonl, so there is nothing to report"),
        ([good, tmp_path / "empty"], "has no line of metrics"),
        ([good, good], "names a workdir twice"),
    ]:
        with pytest.raises(UserError, match=says):
            write_report(tmp_path / "out", *runs)
    assert not (tmp_path / "out").exists()


def test_as_a_command(tmp_path):
    """Without any device: the platform that is asked for doesn't exist."""
    run = two_steps(tmp_path)
    said = succeed(SMOKE, f"--workdir={run}", "--mode=report", env={"JAX_PLATFORMS": "none_such"}).stdout
    assert re.search(r"wrote .*/report.html \(\d+\.\d MiB\) about 1 run\n", said)
    page = Page((run / "report.html").read_text())
    logged = rows(run)
    assert page.data["runs"][0]["steps"] == list(logged)
    for name in ("loss", "pixel", "frequency", "gradient_norm", "images_per_second"):
        expected = [row[name] for row in logged.values()]
        np.testing.assert_allclose(page.data["runs"][0]["metrics"][name], expected, rtol=1e-8)

    result = run_main(SMOKE, f"--workdir={tmp_path / 'nothing'}", "--mode=report")
    assert result.returncode == 1
    assert re.fullmatch(r"error: no such workdir: [^\n]*\n", result.stderr)
    assert os.listdir(tmp_path) == ["run"]


def test_in_a_browser(full):
    """No error, no request; curves, slider by keyboard, hiding a run."""
    folder, _ = full
    with browser() as open_page:
        page = open_page((folder / "out" / "report.html").as_uri())
        # 5 losses, 2 of speed, 2 spectra; no FID was logged.
        assert page.locator("figure.chart").count() == 9
        assert page.locator("figure.chart > svg path").count() >= 2 * 4 + 4
        assert "0.8333" in page.locator(".readout").first.inner_text()
        assert page.locator(f"figcaption:text-is({json.dumps(EVIL.replace('_', ' '))})").count() == 1

        def visible():
            return [image.get_attribute("data-step") for image in page.locator("img:visible").all()]

        assert visible() == ["6", "8"]
        page.locator("#time").focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert visible() == ["4"]
        assert page.locator(".when").all_inner_texts() == ["step 4", "no samples yet"]
        page.keyboard.press("Home")
        assert visible() == ["2"]

        chart = page.locator("figure.chart").first
        chart.locator("svg").focus()
        page.keyboard.press("Home")
        assert chart.locator(".readout").inner_text() == "step 2: a 5"
        before = chart.locator("path").first.get_attribute("d")
        page.locator("#log").check()
        assert chart.locator("path").first.get_attribute("d") != before
        page.locator("#smoothing").fill("0.5")
        # At the last of 5, 2.5 and 10/6, weights 1, 2 and 4.
        assert f"{(5 + 2 * 2.5 + 4 * 10 / 6) / 7:.4g}" in chart.locator(".readout").inner_text()
        page.locator("[data-run='0']").click()
        assert visible() == []
        assert chart.locator(".readout").inner_text().startswith("last: 1.")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.set_viewport_size({"width": 360, "height": 800})
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
