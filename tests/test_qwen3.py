"""models/qwen3.py against Hugging Face's numbers."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from deco_jax.convert.mapping import flatten, to_torch
from deco_jax.convert.torch_files import write_safetensors
from deco_jax.errors import UserError
from deco_jax.models import qwen3
from deco_jax.models.qwen3 import Qwen3, Sizes
from tests.helpers import golden, golden_params, relative_error

pytestmark = pytest.mark.fast

SMALL = Sizes(64, 32, 48, 3, 4, 2, 16, 1e6, 1e-6)
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "rope_scaling": None,
}


def build(params: dict, dtype=jnp.float32) -> Qwen3:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Qwen3(SMALL, dtype=dtype, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def run(model: Qwen3, name: str) -> jax.Array:
    values = golden(name)
    tokens, mask = jnp.asarray(values["input_ids"], jnp.int32), jnp.asarray(values["attention_mask"], jnp.int32)
    return answer(model, tokens, mask)


@jax.jit
def answer(model: Qwen3, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return model(tokens, mask)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_empty"])
def test_golden(name):
    model = build(qwen3.from_torch(SMALL, golden_params("qwen3")))
    assert relative_error(run(model, name), golden(name)["last_hidden_state"]) < 1e-5


def in_float64(tensors: dict, frequencies: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Qwen3 by its equations in NumPy, with the rotary frequencies given."""
    p = {name: np.asarray(a, np.float64) for name, a in tensors.items()}

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * p[name]

    def turned(x):  # [batch, length, heads, 16]
        angles = np.arange(x.shape[1])[:, None, None] * np.concatenate([frequencies, frequencies])
        swapped = np.concatenate([-x[..., 8:], x[..., :8]], axis=-1)
        return x * np.cos(angles) + swapped * np.sin(angles)

    h = p["embed_tokens.weight"][tokens]
    batch, length, _ = h.shape
    seen = np.tril(np.ones((length, length), bool)) & mask.astype(bool)[:, None, :]
    for i in range(3):
        block = f"layers.{i}"
        x = norm(h, f"{block}.input_layernorm.weight")
        q, k, v = ((x @ p[f"{block}.self_attn.{kind}_proj.weight"].T).reshape(batch, length, -1, 16) for kind in "qkv")
        q, k = norm(q, f"{block}.self_attn.q_norm.weight"), norm(k, f"{block}.self_attn.k_norm.weight")
        q, k, v = turned(q), np.repeat(turned(k), 2, axis=2), np.repeat(v, 2, axis=2)
        scores = np.where(seen[:, None], np.einsum("bqhc,bkhc->bhqk", q, k) / 4, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bhqk,bkhc->bqhc", weights, v).reshape(batch, length, -1)
        h = h + y @ p[f"{block}.self_attn.o_proj.weight"].T
        x = norm(h, f"{block}.post_attention_layernorm.weight")
        gate, up = (x @ p[f"{block}.mlp.{kind}_proj.weight"].T for kind in ("gate", "up"))
        h = h + (gate / (1 + np.exp(-gate)) * up) @ p[f"{block}.mlp.down_proj.weight"].T
    return norm(h, "norm.weight")


@pytest.mark.parametrize("rounded", [False, True])
def test_rotary_frequencies_are_rounded_with_the_network(rounded):
    """The official encoder is cast to bfloat16 as a whole, its frequencies too; 400 positions show a 0.4 % change."""
    tensors, rng = golden_params("qwen3"), np.random.default_rng(0)
    tokens, mask = rng.integers(0, 64, (2, 400)), np.ones((2, 400), bool)
    exact = 1e6 ** (-np.arange(8) / 8)
    frequencies = exact.astype(ml_dtypes.bfloat16 if rounded else np.float32).astype(np.float64)
    params = qwen3.from_torch(SMALL, tensors)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Qwen3(SMALL, frequency_dtype=jnp.bfloat16 if rounded else jnp.float32, rngs=nnx.Rngs(0)))
    )
    nnx.replace_by_pure_dict(state, params)
    actual = answer(nnx.merge(graphdef, state), jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
    expected = in_float64(tensors, frequencies, tokens, mask)
    assert relative_error(actual, expected) < 3e-5
    other = in_float64(tensors, exact, tokens, mask) if rounded else expected
    assert not rounded or relative_error(actual, other) > 1e-3
    # Who asks for a bfloat16 encoder gets the official one's frequencies.
    assert Qwen3(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).frequency_dtype == jnp.bfloat16


def test_the_empty_prompt_is_one_vector_in_every_dtype():
    """Nothing attended to means that a state depends on its own token alone, and all are the padding token."""
    for dtype in (jnp.float32, jnp.bfloat16):
        model = build(qwen3.from_torch(SMALL, golden_params("qwen3")), dtype)
        states = answer(model, jnp.full((1, 8), 3, jnp.int32), jnp.zeros((1, 8), bool))
        assert states.dtype == dtype
        assert np.all(np.isfinite(states))
        # XLA sums some rows in another order than others, depending on the processor.
        states = np.asarray(states, np.float32)
        rounding = 8 * float(jnp.finfo(dtype).eps) * abs(states).max()
        np.testing.assert_allclose(states, np.broadcast_to(states[:, :1], states.shape), rtol=0, atol=rounding)


def test_padding_and_the_future_are_not_seen():
    model = build(qwen3.from_torch(SMALL, golden_params("qwen3")))
    tokens = jnp.arange(10, dtype=jnp.int32)[None]
    mask = jnp.arange(10)[None] < 6
    states = answer(model, tokens, mask)
    changed = answer(model, tokens.at[0, 4].set(60), mask)
    np.testing.assert_array_equal(states[:, :4], changed[:, :4])
    assert relative_error(changed[:, 5], states[:, 5]) > 1e-3
    padded = answer(model, tokens.at[0, 7].set(60), mask)
    np.testing.assert_array_equal(np.delete(states, 7, axis=1), np.delete(padded, 7, axis=1))


def test_bfloat16_stays_close():
    params = qwen3.from_torch(SMALL, golden_params("qwen3"), dtype=jnp.bfloat16)
    states = run(build(params, jnp.bfloat16), "qwen3")
    assert 1e-4 < relative_error(states, golden("qwen3")["last_hidden_state"]) < 5e-2


def test_round_trip_is_exact():
    tensors = golden_params("qwen3")
    back = to_torch(qwen3.table(3), qwen3.from_torch(SMALL, tensors))
    assert back.keys() == tensors.keys()
    for name, a in tensors.items():
        np.testing.assert_array_equal(back[name], a, err_msg=name)


def test_the_published_size():
    """Qwen3-1.7B's published count: 1.7 billion, 1.4 without the embedding."""
    shapes = flatten(qwen3.shapes(Sizes()))
    total = sum(leaf.size for leaf in shapes.values())
    assert total == 1_720_574_976
    assert total - shapes["embed.embedding"].size == 1_409_410_048


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder: two files, bfloat16, `model.` in front, the tied output layer written out too."""
    tensors = {f"model.{k}": a.astype(ml_dtypes.bfloat16) for k, a in golden_params("qwen3").items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    index = {}
    for shard in range(2):
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        part = dict(list(tensors.items())[shard::2])
        write_safetensors(tmp_path / file, part)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_loading_a_sharded_folder(folder):
    sizes, params = qwen3.load_encoder(folder)
    assert sizes == SMALL
    assert params["blocks"]["mlp"]["up"]["kernel"].dtype == ml_dtypes.bfloat16
    assert params["norm"]["scale"].dtype == np.float32
    rounded = golden_params("qwen3")["layers.2.mlp.up_proj.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(params["blocks"]["mlp"]["up"]["kernel"][2], rounded.T)
    _, params = qwen3.load_encoder(folder, dtype=np.float32)
    assert {a.dtype for a in flatten(params).values()} == {np.dtype(np.float32)}
    assert relative_error(run(build(params), "qwen3"), golden("qwen3")["last_hidden_state"]) < 5e-2


def test_newer_configurations(folder):
    config = {k: v for k, v in CONFIG.items() if k not in ("rope_theta", "rope_scaling")}
    config["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(config))
    assert qwen3.read_sizes(folder).rope_theta == 5e5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type='llama' isn't supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True isn't supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling=.*yarn.* isn't supported"),
        ({"hidden_size": None}, "no readable Qwen3 configuration"),
        ({"num_hidden_layers": 4}, r"tensors missing: 11 \(layers\.3"),
        ({"intermediate_size": 64}, r"mlp\.gate_proj.*gives blocks\.mlp\.gate\.kernel the shape"),
    ],
)
def test_other_networks_are_refused(folder, change, message):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(UserError, match=message):
        qwen3.load_encoder(folder)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(UserError, match=r"path is empty.*huggingface\.co/Qwen/Qwen3-1\.7B"):
        qwen3.load_encoder(None)
    with pytest.raises(UserError, match=r"no such folder.*huggingface\.co"):
        qwen3.load_encoder(tmp_path / "none")
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        qwen3.load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        qwen3.load_encoder(tmp_path)
