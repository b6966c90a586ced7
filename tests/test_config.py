"""Every setting is checked, and read by something; every config is a document that passes."""

from __future__ import annotations

import importlib
import inspect
import json
import re

import pytest

from configs import ablation, cifar10, imagenet256, jit256, quickstart, t2i_256
from deco_jax import config as config_lib
from deco_jax import schema
from deco_jax.errors import UserError
from deco_jax.models import network
from deco_jax.models.network import MODELS
from tests.helpers import ROOT

pytestmark = pytest.mark.fast

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
TEXT = "\n".join(
    p.read_text() for p in (ROOT / "deco_jax").rglob("*.py") if p.parent.name != "config" and p.name != "main.py"
)


def variants(name: str) -> set[str]:
    """The default, smoke, and those that the refusal of an unknown one lists."""
    module = importlib.import_module(f"configs.{name}")
    default = inspect.signature(module.get_config).parameters["variant"].default
    with pytest.raises(ValueError, match=r"there is no .*'nope'; choose") as caught:
        module.get_config("nope")
    listed = re.sub(r"\(.*\)|one of", "", str(caught.value).partition("choose ")[2])
    return {default, "smoke", *re.split(r", | or ", listed.strip())}


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_passes(name):
    module = importlib.import_module(f"configs.{name}")
    for variant in variants(name):
        config = module.get_config(variant)
        assert config.is_locked
        config_lib.check(config)
        assert json.loads(json.dumps(config_lib.to_json(config))) == config_lib.to_json(config)


@pytest.mark.parametrize("row", ablation.ROWS)
def test_every_row_of_the_ablation_passes(row):
    for variant in (row, f"{row}-smoke"):
        config_lib.check(ablation.get_config(variant))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_a_document(name):
    document = importlib.import_module(f"configs.{name}").__doc__
    assert f"python -m deco_jax.main --config=configs/{name}.py" in document
    assert max(map(len, document.splitlines())) <= 120  # a backslash that Python reads joins two lines of a command
    for word in (
        r"[Hh]ardware|cores|GPU|A800",
        r"[Tt]ime|seconds|minutes|hours",
        r"FID|[Ee]xpected|[Mm]easure|[Ff]igures",
    ):
        assert re.search(word, document), f"{name} says nothing of {word}"


@pytest.mark.parametrize("section", [*config_lib.SECTIONS, "top"])
def test_every_setting_is_read(section):
    """A crude search that finds what nobody mentions: `.key` in the code outside the table."""
    keys = config_lib.TOP if section == "top" else config_lib.SECTIONS[section]
    assert [key for key in keys if not re.search(rf"\.{key}\b|\"{key}\"", TEXT)] == []


def test_models_take_exactly_the_settings_of_their_table():
    rows = [ablation.get_config(f"{row}-smoke") for row in ("dit", "pixnerd")]
    configs = [quickstart.get_config("smoke"), jit256.get_config("smoke"), *rows]
    assert {config.model.name for config in configs} == set(config_lib.MODEL) == set(MODELS)
    for config in configs:
        config_lib.check(config)
        network.build(config.model.to_dict())
        with pytest.raises(TypeError, match="nope"):
            network.build({**config.model.to_dict(), "nope": 1})


WRONG = [
    ("seed", -1, "seed=-1 must be from 0 to"),
    ("seed", 1.5, "seed=1.5 must be of type int"),
    ("model.name", "unet", "model.name='unet'"),
    ("model.prediction", "eps", "one of v, x"),
    ("model.width", 0, "width=0 must be at least"),
    ("model.num_heads", 5, "num_heads=5 does not divide .*width=32"),
    ("model.num_heads", 16, "head width 2 .*multiple of 4"),
    ("model.context_start", 9, "context_start=9 is deeper than config.model.depth"),
    ("sample.guidance_interval", (-0.5, 0.3), r"two times \(low, high\)"),
    ("model.patch_size", 5, "patch_size=5 does not divide the image, 16x16"),
    ("model.decoder_patch_size", 3, "decoder_patch_size=3 does not divide"),
    ("model.dtype", "float16", "one of bfloat16, float32"),
    ("model.remat", "some", "model.remat='some'"),
    ("model.num_classes", 0, "conditioned on classes or on text"),
    ("model.text_width", 8, "conditioned on classes or on text"),
    ("data.source", "web", "one of digits, image_folder, tfds"),
    ("data.image_size", 7, "at least 8 pixels"),
    ("data.image_size", (16, 7), "at least 8 pixels"),
    ("data.image_size", (16, 16, 3), "at least 8 pixels"),
    ("data.image_size", 16.0, "of type int or tuple"),
    ("data.batch_size", 0, "batch_size=0 must be at least 1"),
    ("data.num_workers", -1, "num_workers=-1 must be at least 0"),
    ("data.max_unreadable", 1.5, "from 0 to 1"),
    ("mesh.data", 0, "at least 1, or -1"),
    ("mesh.fsdp", -2, "at least 1, or -1"),
    ("optimizer.learning_rate", 0.0, "must be above 0"),
    ("optimizer.learning_rate", float("nan"), "must be above 0"),
    ("optimizer.learning_rate", float("inf"), "must be above 0"),
    ("optimizer.b2", 1.0, "to below 1"),
    ("optimizer.accumulate_steps", 3, "accumulate_steps=3 does not divide .*batch_size=16"),
    ("optimizer.ema_decay", 1.1, "from 0 to 1"),
    ("loss.frequency_quality", 0, "from 1 to 100"),
    ("loss.label_dropout", -0.1, "from 0 to 1"),
    ("loss.time_shift", 0.0, "must be above 0"),
    ("loss.time_mean", float("nan"), "a finite number"),
    ("sample.sampler", "ddim", "sample.sampler='ddim' must be one of euler"),
    ("sample.guidance_interval", (0.5, 0.1), r"two times \(low, high\)"),
    ("sample.guidance_interval", (0.1,), r"two times \(low, high\)"),
    ("sample.guidance_interval", ("a", 1.0), r"two times \(low, high\)"),
    ("sample.guidance_interval", (None, 1.0), r"two times \(low, high\)"),
    ("seed", 2**63, "seed=9223372036854775808 must be from 0"),
    ("sample.seed", -1, "must be from 0"),
    ("model.attention", "cudnn", "cudnn needs config.model.dtype=bfloat16, not float32"),
    ("sample.num_images", 0, "at least 1"),
    ("train.num_steps", 0, "num_steps=0 must be at least 1"),
    ("train.num_steps", True, "of type int"),
    ("train.keep_checkpoints", 0, "at least 1"),
    ("data.flip", 1, "of type bool"),
    ("text.encoder", "clip", "text.encoder='clip' must be one of qwen3, bytes"),
    ("text.dtype", "float16", "one of bfloat16, float32"),
    ("init_optimizer", 1, "of type bool"),
    ("sample.images_per_prompt", -1, "at least 0"),
    ("sample.prompts", "a cat", "for text-to-image models, but config.model.text_width is 0"),
    ("sample.negative_prompt", "blur", "for text-to-image models"),
    ("sample.images_per_prompt", 2, "for text-to-image models"),
    # Sizes that no machine has: each ended in a traceback, a hang or gigabytes.
    ("model.width", 2**31, "at least 4 and at most 65,536"),
    ("model.depth", 10**9, "at most"),
    ("model.num_classes", 2**31, "at most"),
    ("data.image_size", 1_000_000, "at most 8,192"),
    ("data.image_size", (16, 2**40), "at most 8,192"),
    ("data.batch_size", 4294967296, "at least 1 and at most"),
    ("data.num_workers", 1000, "at least 0 and at most 256"),
    ("optimizer.learning_rate", 1e300, "above 0 and at most"),
    ("sample.num_images", 2147483647, "at most 10,000,000"),
    ("sample.batch_size", 2**31, "at most"),
    ("sample.guidance", 10**400, "sample.guidance=1000"),
    ("train.num_steps", 2**31, "at most"),
    ("evaluate.batch_size", 2**40, "at most"),
    ("spectrum.batch_size", 2**40, "at most"),
]


def test_every_number_has_a_range():
    """Seeds and shares too: nothing absurd gets as far as an allocation."""
    sections = {"": config_lib.TOP, **config_lib.SECTIONS, **config_lib.MODEL}
    numbers = [
        (f"{section}.{name}", declared)
        for section, settings in sections.items()
        for name, declared in settings.items()
        if int in declared.kinds and bool not in declared.kinds
    ]
    assert len(numbers) > 50
    for name, declared in numbers:
        for value in (1e39, -1e39, 10**400) if float in declared.kinds else (2**80, -(2**80), 10**400):
            assert schema.wrong(name, value, declared), name


def test_every_setting_is_explained_and_its_default_allowed():
    for section, settings in {"": config_lib.TOP, **config_lib.SECTIONS, **config_lib.MODEL}.items():
        for name, declared in settings.items():
            assert re.fullmatch(r"[^\n]+[.)]", declared.help), (section, name)
            assert schema.wrong(name, declared.default, declared) == "", (section, name)


@pytest.mark.parametrize("key, value, message", WRONG)
def test_wrong_values(key, value, message):
    values = quickstart.get_config("smoke").to_dict()
    section, _, name = key.rpartition(".")
    (values[section] if section else values)[name] = value
    with pytest.raises(UserError, match=message) as caught:
        config_lib.check(Plain(values))
    assert "\n" not in str(caught.value)


class Plain:
    """A config that takes any value; a ConfigDict would refuse some of them first."""

    def __init__(self, values: dict) -> None:
        self._values = values

    def __getattr__(self, name: str):
        value = self._values[name]
        return Plain(value) if isinstance(value, dict) else value

    def to_dict(self) -> dict:
        return self._values


def test_keys_and_sections_that_are_missing_or_unknown():
    def check(message: str, change) -> None:
        config = imagenet256.get_config("smoke")
        with config.unlocked():
            change(config)
        with pytest.raises(UserError, match=message):
            config_lib.check(config)

    check("config.loss.repa_wieght .*did you mean repa_weight", lambda c: c.loss.update({"repa_wieght": 1.0}))
    check("config.sampel is not a section .*did you mean sample", lambda c: c.update({"sampel": {"seed": 0}}))
    check("config.train.log_every is missing", lambda c: c.train.__delitem__("log_every"))
    check("config.mesh is missing", lambda c: c.__delitem__("mesh"))
    check("config.seed is missing", lambda c: c.__delitem__("seed"))
    check("config.model.decoder_ratio is not a setting", lambda c: c.model.update({"decoder_ratio": 1}))


def test_bytes_need_a_channel_each():
    config = t2i_256.get_config("smoke")
    config.model.text_width = 256
    with pytest.raises(UserError, match=r"encoder=bytes has 257 symbols; set config.model.text_width=257 or more"):
        config_lib.check(config)


def test_differences_between_models():
    ours = quickstart.get_config("smoke").model.to_dict()
    assert config_lib.model_differences(ours, {**ours, "dtype": "bfloat16", "remat": "full", "unroll": 2}) == []
    assert config_lib.model_differences(ours, {**ours, "depth": 7}) == ["depth: 7 there, 2 here"]


def test_a_setting_that_an_older_version_lacks_is_at_its_default():
    """Of a saved config, and where a checkpoint's model is compared with ours."""
    config = quickstart.get_config("smoke")
    older = config_lib.to_json(config)
    older["data"]["image_size"] = 16  # as it was stored before
    del older["model"]["decoder_interaction"], older["train"]["keep_checkpoints"], older["report"]
    assert config_lib.complete(older) == config_lib.to_json(config)
    assert config_lib.model_differences(config.model.to_dict(), older["model"]) == []
    assert config_lib.model_differences(older["model"], {**config.model.to_dict(), "decoder_interaction": "add"}) == [
        "decoder_interaction: add there, adaln here"
    ]
    made = config_lib.make_config(older)
    config_lib.check(made)
    assert made.is_locked
    assert made.sample.guidance_interval == config.sample.guidance_interval
    assert config_lib.unknown({**older, "note": 1, "data": {**older["data"], "colour": "red"}}) == [
        "note",
        "data.colour",
    ]


def test_another_model_keeps_what_both_have():
    config = imagenet256.get_config("L")
    config_lib.set_model(config, "pixnerd", decoder_depth=2)
    config_lib.check(config)
    assert config.is_locked
    assert (config.model.depth, config.model.decoder_width, config.model.decoder_depth) == (22, 32, 2)
    assert (config.model.decoder_ratio, config.model.get("decoder_chunk")) == (2, None)
    with pytest.raises(UserError, match=r"model\.name='unet' is not a model; choose one of deco"):
        config_lib.set_model(config, "unet")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model.context_tokens": 2, "model.context_start": 2}, "leaves the config.model.context_tokens no block"),
        ({"loss.lpips_weight": 0.1, "lpips.pixels_per_patch": 0, "data.image_size": (8, 8)}, "8 pixels a side"),
        (
            {"model.attention": "cudnn", "model.dtype": "bfloat16", "model.width": 48, "model.num_heads": 4},
            "head width 12 .*multiple of 8",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, says):
    config = quickstart.get_config("smoke")
    config.model.depth = 2
    config_lib.check(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=says):
        config_lib.check(config)


def test_image_sizes_are_pairs():
    config = quickstart.get_config()
    assert config.data.image_size == (16, 16)
    config.data.image_size = 32
    config_lib.check(config)
    config_lib.settle_image_size(config)
    assert config.data.image_size == (32, 32)


@pytest.mark.parametrize(("size", "share"), [("", 0.02), ("-cpu", 0.06)])
def test_cifar10s_rows_have_equal_parameters(size, share):
    def count(row: str) -> int:
        config = cifar10.get_config(row + size)
        config_lib.check(config)
        return network.build(config.model.to_dict()).num_params

    for row in (*cifar10.ROWS, "patch2"):
        assert abs(count(row) / count("deco") - 1) < share, row
        config_lib.check(cifar10.get_config(f"{row}-smoke"))


def test_the_home_folder_in_lists_of_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = quickstart.get_config("smoke")
    config.report.workdirs, config.init_from, config.data.prior_path = "~/a,b,~/c", "~/x,~/y", "a~"
    config_lib.settle_paths(config)
    assert config.report.workdirs == "/home/me/a,b,/home/me/c"
    assert (config.init_from, config.data.prior_path) == ("/home/me/x,~/y", "a~")  # one path each
