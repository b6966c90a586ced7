"""Captions to tokens, features and batches: on the way or encoded once."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax import nnx

from configs import t2i_256
from deco_jax.conditioning import condition, encoders, texts
from deco_jax.conditioning.requests import caption_requests, prompt_requests
from deco_jax.data import features as features_lib
from deco_jax.data import pipeline, sources
from deco_jax.errors import UserError
from deco_jax.method import training
from deco_jax.method.objective import make_method
from deco_jax.method.step import Draws, Observed
from deco_jax.models import qwen3
from deco_jax.models.network import Network
from deco_jax.models.qwen3 import Qwen3
from deco_jax.programs import encode
from deco_jax.run import sharding
from tests.helpers import relative_error
from tests.texts import SIZES, hard_captions, write_encoder, write_tokenizer

REAL = os.environ.get("DECO_JAX_QWEN_TOKENIZER", "")
LENGTH = 24


def small_config(folder: pathlib.Path | None = None, **settings):
    """The smoke's model; with a folder, on the features of the Qwen3 in it."""
    config = t2i_256.get_config("smoke")
    config.sample.num_steps = 2
    if folder is not None:
        config.text.update({"encoder": "qwen3", "path": str(folder), "dtype": "float32"})
        config.model.text_width = 40  # wider than the encoder
    config.update_from_flattened_dict(settings)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("qwen3"))


# ---------------------------------------------------------------------------------------- tokens


def test_tokens_are_those_of_hugging_face(tmp_path):
    """Whose own padding and truncation are the reference."""
    write_tokenizer(tmp_path / "tokenizer.json")
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    padding = reference.token_to_id("<|endoftext|>")
    reference.enable_padding(direction="right", pad_id=padding, pad_token="<|endoftext|>", length=LENGTH)
    reference.enable_truncation(LENGTH)
    ours = pickle.loads(pickle.dumps(encoders.FileTokenizer(str(tmp_path / "tokenizer.json"), LENGTH)))
    cut = 0
    for caption in hard_captions():
        expected, tokens = reference.encode(caption), ours(caption)
        assert tokens["tokens"].dtype == np.int32
        assert tokens["mask"].dtype == bool
        assert tokens["tokens"].tolist() == expected.ids
        assert tokens["mask"].tolist() == [bool(m) for m in expected.attention_mask]
        cut += bool(expected.overflowing)
    assert cut > 20
    # " cat" is one piece after three merges; nothing stands before or after the text.
    assert ours("a cat")["mask"].sum() == 2
    assert ours("")["tokens"].tolist() == [padding] * LENGTH
    assert len(pickle.dumps(ours)) < 500


@pytest.mark.skipif(not REAL, reason="DECO_JAX_QWEN_TOKENIZER names no tokenizer.json of Qwen3")
def test_tokens_of_the_real_tokenizer():
    """Against transformers where it is installed, else against tokenizers' own padding and truncation."""
    ours = encoders.FileTokenizer(REAL, 128)
    try:
        import transformers
    except ImportError:
        reference = tokenizers.Tokenizer.from_file(REAL)
        reference.enable_padding(direction="right", pad_id=151643, pad_token="<|endoftext|>", length=128)
        reference.enable_truncation(128)
        expected = [(e.ids, e.attention_mask) for e in map(reference.encode, hard_captions())]
    else:
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=REAL, pad_token="<|endoftext|>")
        found = theirs(hard_captions(), padding="max_length", truncation=True, max_length=128, padding_side="right")
        expected = list(zip(found["input_ids"], found["attention_mask"], strict=True))
    assert len(expected) == 100
    for caption, (ids, mask) in zip(hard_captions(), expected, strict=True):
        tokens = ours(caption)
        assert tokens["tokens"].tolist() == list(ids), caption[:50]
        assert tokens["mask"].tolist() == [bool(m) for m in mask], caption[:50]
    assert ours("")["tokens"].tolist() == [151643] * 128


def test_bytes():
    tokens = encoders.ByteTokenizer(8)("é🦊 abc")
    assert tokens["tokens"].tolist() == [0xC3, 0xA9, 0xF0, 0x9F, 0xA6, 0x8A, 0x20, 0x61]
    assert tokens["mask"].all()
    tokens = encoders.ByteTokenizer(4)("a")
    assert tokens["tokens"].tolist() == [0x61, 256, 256, 256]
    assert tokens["mask"].tolist() == [True, False, False, False]
    features = np.asarray(encoders.byte_features({}, jnp.asarray(tokens["tokens"][None]), None, width=260), np.float32)
    assert features.shape == (1, 4, 260)
    assert np.argwhere(features[0]).tolist() == [[0, 0x61], [1, 256], [2, 256], [3, 256]]


def test_what_is_wrong_with_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file.*huggingface"):
        encoders.FileTokenizer(str(tmp_path / "tokenizer.json"), 8)("a")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match=r"not a readable tokenizer"):
        encoders.FileTokenizer(str(tmp_path / "tokenizer.json"), 8)("a")
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"has no <\|endoftext\|>"):
        encoders.FileTokenizer(str(tmp_path / "tokenizer.json"), 8)("a")


# ---------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("width", [20, 32, 40])
def test_features_are_the_encoders_last_states(folder, width):
    """Cut or filled up with zeros to the model's width, in bfloat16."""
    config = small_config(folder)
    config.model.text_width = width
    encoder = encoders.open_encoder(config)
    captions = ["a cat", "", "x" * 50]
    tokens = [encoder.tokenizer(caption) for caption in captions]
    ids, mask = (jnp.asarray(np.stack([t[name] for t in tokens])) for name in ("tokens", "mask"))
    features = np.asarray(jax.jit(encoder.network.apply)(encoder.network.load(), ids, mask))
    assert features.dtype == ml_dtypes.bfloat16

    sizes, params = qwen3.load_encoder(folder)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Qwen3(sizes, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    expected = np.asarray(nnx.merge(graphdef, state)(ids, mask))
    shared = min(width, 32)
    assert features.shape == (3, LENGTH, width)
    assert relative_error(features[..., :shared].astype(np.float32), expected[..., :shared]) < 4e-3
    assert not features[..., shared:].any()


def test_encoder_is_known_by_its_files(folder, tmp_path):
    def fingerprint(path, **settings):
        return encoders.open_encoder(small_config(path, **settings)).fingerprint

    same = pathlib.Path(shutil.copytree(folder, tmp_path / "same"))
    assert fingerprint(same) == fingerprint(folder)
    others = {
        fingerprint(folder, **{"text.dtype": "bfloat16"}),
        fingerprint(folder, **{"model.text_length": 8}),
        fingerprint(write_encoder(tmp_path / "other", seed=1)),
    }
    tokenizer = json.loads((same / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (same / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(others | {fingerprint(same), fingerprint(folder)}) == 5


def test_weights_are_split_and_kept_in_their_type(folder):
    config = small_config(folder, **{"text.dtype": "bfloat16"})
    shapes = encoders.abstract_encoder(config).network.shapes
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    placed = sharding.state_shardings(mesh, {"encoder": shapes, "null": jax.ShapeDtypeStruct((24, 40), jnp.bfloat16)})
    for path, leaf in jax.tree.leaves_with_path(placed):
        whole = "fsdp" not in leaf.spec
        assert whole == sharding.path_name(path).endswith(("scale", "null")), path
    params = encoders.open_encoder(config).network.load()
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), params, shapes)
    assert params["blocks"]["attention"]["query"]["kernel"].dtype == ml_dtypes.bfloat16
    assert params["norm"]["scale"].dtype == np.float32


# ---------------------------------------------------------------------------------------- encoded once


@pytest.fixture(scope="module")
def stored(folder, tmp_path_factory):
    """A config whose captions are encoded, in several files."""
    config = small_config(folder)
    config.text.features = str(tmp_path_factory.mktemp("stored") / "features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features_lib, "SHARD_BYTES", 2 * LENGTH * 40 * 500)
        encode.encode(config, "")
    assert len(list(pathlib.Path(config.text.features).glob("features_*.npy"))) == 4
    return config


def copy(config, tmp_path):
    changed = config.copy_and_resolve_references()
    changed.text.features = str(shutil.copytree(config.text.features, tmp_path / "features"))
    return changed


def batches_and_contexts(config, steps: int, num_workers: int = 0):
    mesh = sharding.make_mesh(1, 1)
    source = sources.open_source(config.data)
    known = condition.open_condition(config, mesh, source)
    frozen = known.load()
    look = jax.jit(lambda frozen, batch: (known.context(frozen, batch), known.null(frozen)))
    batches = pipeline.train_batches(
        source, image_size=(32, 32), batch_size=16, seed=3, encode_caption=known.encode_caption, num_workers=num_workers
    )
    try:
        for _ in range(steps):
            batch = next(batches)
            context, null = look(frozen, {name: batch[name] for name in known.inputs})
            yield batch, np.asarray(context, np.float32), np.asarray(null, np.float32)
    finally:
        batches.close()


def test_encoded_once_is_encoded_on_the_way(folder, stored):
    for (batch, context, null), (kept, again, null_again) in zip(
        batches_and_contexts(small_config(folder), 5), batches_and_contexts(stored, 5, num_workers=1), strict=True
    ):
        np.testing.assert_array_equal(batch["image"], kept["image"])
        assert context.shape == again.shape == (16, LENGTH, 40)
        # Another batch size is another program; the last bit of bfloat16 may differ.
        np.testing.assert_allclose(context, again, rtol=2**-7, atol=2**-7)
        np.testing.assert_allclose(null, null_again, rtol=2**-7, atol=2**-7)
        assert len(np.unique(context.reshape(16, -1), axis=0)) > 3
        assert kept.keys() == {"image", "label", "text", "unreadable"}


def test_half_of_the_short_captions_get_the_prefix():
    captions = [f"caption number {i}" for i in range(1000)]
    with_prefix = [encoders.prefixed(caption, "A photo of ") for caption in captions]
    assert 450 < sum(new == f"A photo of {old}" for new, old in zip(with_prefix, captions, strict=True)) < 550
    assert all(new.endswith(old) for new, old in zip(with_prefix, captions, strict=True))
    long = [f"{i} " + "word " * 29 for i in range(100)]
    assert [encoders.prefixed(caption, "A photo of ") for caption in long] == long
    assert any(encoders.prefixed(caption[2:], "A photo of ") != caption[2:] for caption in long)  # 29 words
    assert [encoders.prefixed(caption, "") for caption in captions] == captions


def test_what_is_kept_is_what_the_captions_say(stored):
    source, store = sources.CaptionedDigits(), features_lib.Features(stored.text.features, {"width": 40})
    assert len(store) == 1797
    mesh = sharding.make_mesh(1, 1)
    known = texts.Texts(stored, mesh, source, encoders.open_encoder(stored), None)
    weights = known.load_encoder()
    indices = [0, 499, 500, 1796]
    expected = known.encode(weights, [encoders.prefixed(source[i]["caption"], stored.text.prefix) for i in indices])
    kept = np.stack([store[i] for i in indices]).view(ml_dtypes.bfloat16)
    np.testing.assert_allclose(kept.astype(np.float32), expected.astype(np.float32), rtol=2**-7, atol=2**-7)
    reopened = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(reopened[499], store[499])
    assert len(pickle.dumps(store)) < 1000


def test_a_cut_off_encoding_goes_on(stored, tmp_path, capsys):
    config = copy(stored, tmp_path)
    folder = pathlib.Path(config.text.features)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "captions_00002.npy").unlink()
    (folder / "features_00003.npy").write_bytes(b"half")
    (folder / "captions_00003.npy").unlink()
    with pytest.raises(UserError, match=r"incomplete: 2 of 4 .*continues from there"):
        condition.open_condition(config, sharding.make_mesh(1, 1), sources.open_source(config.data))
    encode.encode(config, "")
    assert "1,797 captions, 1,000 of them done" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    encode.encode(config, "")
    assert "1,797 captions, 1,797 of them done" in capsys.readouterr().out


def test_features_of_something_else_are_refused(stored, tmp_path, monkeypatch):
    config, mesh = copy(stored, tmp_path), sharding.make_mesh(1, 1)

    def refused(message, config, source=None):
        source = source or sources.open_source(config.data)
        for action in (lambda: condition.open_condition(config, mesh, source), lambda: encode.encode(config, "")):
            with pytest.raises(UserError, match=message) as caught:
                action()
            assert "\n" not in str(caught.value)

    other = config.copy_and_resolve_references()
    other.text.path = str(write_encoder(tmp_path / "other", seed=1))
    refused("something else .another encoder.*remove the folder", other)
    shorter = config.copy_and_resolve_references()
    shorter.model.text_length = 8
    refused(r"length: 24 there, 8 here", shorter)

    monkeypatch.setattr(sources.CaptionedDigits, "NAMES", tuple("abcdefghij"))
    refused("belong to other captions .*'a handwritten a'", config)
    # A single one that the look beforehand misses is found when it is read.
    store = features_lib.Features(config.text.features, {})
    store(0, "a handwritten zero")
    with pytest.raises(UserError, match="number 0 is now 'a handwritten one'"):
        store(0, "a handwritten one")
    store_file = pathlib.Path(config.text.features) / "store.json"
    store_file.write_text("{")
    refused("store.json can't be read", config)


def test_without_an_encoder_only_prompts_are_refused(stored):
    """Training reads features of any encoder when no path is set; a prompt needs the encoder."""
    config = stored.copy_and_resolve_references()
    config.text.path = ""
    mesh, source = sharding.make_mesh(1, 1), sources.open_source(config.data)
    known = condition.open_condition(config, mesh, source)
    assert known.load().keys() == {"null"}
    requests = caption_requests(known, 10)
    assert requests.context(np.arange(4)).shape == (4, LENGTH, 40)
    assert list(requests.names[:2]) == [source[0]["caption"], source[179]["caption"]]
    with pytest.raises(UserError, match=r"a prompt needs the text encoder.*config\.text\.path is empty"):
        prompt_requests(known, ["a cat"])
    # Before anything is drawn, not at the first grid or FID.
    config.sample.negative_prompt = "blurry"
    with pytest.raises(UserError, match=r"a prompt needs the text encoder.*config\.text\.path is empty"):
        condition.open_condition(config, mesh, source)
    config.sample.negative_prompt = ""
    config.text.features = ""
    with pytest.raises(UserError, match=r"config\.text\.path is empty; download .*huggingface\.co/Qwen/Qwen3-1\.7B"):
        condition.open_condition(config, mesh, source)


# ---------------------------------------------------------------------------------------- in the objective


def test_dropped_captions_become_the_empty_prompt():
    config, seen = small_config(), {}

    def apply(params, x_t, times, context, aligned_layer, keys):
        seen["context"] = np.asarray(context)
        return jnp.zeros_like(x_t), {}

    draw = np.random.default_rng(0)
    context, null = draw.normal(size=(3, LENGTH, 257)), draw.normal(size=(LENGTH, 257))
    draws = Draws(jnp.zeros((3, 32, 32, 3)), jnp.full(3, 0.5), jnp.asarray([False, True, False]))
    make_method(config).objective(
        {"denoiser": {}},
        np.zeros((3, 32, 32, 3), np.uint8),
        draws,
        Observed(jnp.asarray(context, jnp.bfloat16), jnp.asarray(null, jnp.bfloat16)),
        networks={"denoiser": Network(lambda key: {}, apply, {})},
    )
    expected = np.stack([context[0], null, context[2]]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(seen["context"], expected)


def test_frozen_weights_are_arguments_of_the_step(folder):
    """Not constants of the program, which would hold a copy of them."""
    config, mesh = small_config(folder), sharding.make_mesh(1, 1)
    known = condition.open_condition(config, mesh, sources.open_source(config.data))
    networks, observe, _ = training.abstract_networks(config, mesh, known)
    frozen = known.load()
    assert frozen.keys() == {"encoder", "null"}
    batch = {name: jnp.zeros((2, *shape), dtype) for name, (shape, dtype) in known.inputs.items()}
    batch["image"] = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    program = jax.make_jaxpr(observe)(frozen, batch)
    assert sum(np.size(constant) for constant in program.consts) < 1000
    assert SIZES.vocabulary * SIZES.width > 1000
    assert networks.keys() == {"denoiser"}
