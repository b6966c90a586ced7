"""convert/mapping.py: the table engine's strictness and exactness."""

from __future__ import annotations

import numpy as np
import pytest

from deco_jax.convert.mapping import TRANSPOSE, VECTOR, Row, flatten, fused, halves, to_ours, to_torch, unflatten
from deco_jax.errors import UserError

pytestmark = pytest.mark.fast

TABLE = [
    Row("in.weight", "embed.kernel", TRANSPOSE),
    Row("layers.{i}.w.weight", ("blocks.gate.kernel", "blocks.up.kernel"), halves(), count=2, first=3),
    Row(("layers.{i}.q.bias", "layers.{i}.k.bias"), "blocks.qk.bias", fused(2, bias=True), count=2, first=3),
    Row(("layers.{i}.q.weight", "layers.{i}.k.weight"), "blocks.qk.kernel", fused(2), count=2, first=3),
    Row("norm.weight", "norm.scale", VECTOR),
]


def make_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"in.weight": (4, 3), "norm.weight": (4,)}
    for i in (3, 4):
        shapes |= {f"layers.{i}.w.weight": (10, 4), f"layers.{i}.q.bias": (6,), f"layers.{i}.k.bias": (6,)}
        shapes |= {f"layers.{i}.q.weight": (6, 4), f"layers.{i}.k.weight": (6, 4)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_values_and_round_trip():
    tensors = make_tensors()
    ours = to_ours(TABLE, tensors)
    np.testing.assert_array_equal(ours["embed"]["kernel"], tensors["in.weight"].T)
    np.testing.assert_array_equal(ours["blocks"]["gate"]["kernel"][1], tensors["layers.4.w.weight"][:5].T)
    np.testing.assert_array_equal(ours["blocks"]["up"]["kernel"][0], tensors["layers.3.w.weight"][5:].T)
    assert ours["blocks"]["qk"]["kernel"].shape == (2, 4, 12)
    np.testing.assert_array_equal(ours["blocks"]["qk"]["kernel"][0][:, 6:], tensors["layers.3.k.weight"].T)
    back = to_torch(TABLE, ours)
    assert back.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(back[name], tensors[name])


def test_special_floats_survive():
    tensors = make_tensors()
    tensors["norm.weight"] = np.array([0x7FC00001, 0x80000000, 0x00000001, 0xFF800000], np.uint32).view(np.float32)
    back = to_torch(TABLE, to_ours(TABLE, tensors))
    np.testing.assert_array_equal(back["norm.weight"].view(np.uint32), tensors["norm.weight"].view(np.uint32))


def test_tensors_are_read_once_each():
    tensors = make_tensors()
    reads: list[str] = []

    class Lazy(dict):
        def __getitem__(self, name):
            reads.append(name)
            return tensors[name]

    to_ours(TABLE, Lazy(tensors))
    assert sorted(reads) == sorted(tensors)


def test_the_result_does_not_alias_the_source():
    tensors = make_tensors()
    ours = to_ours(TABLE, tensors)
    ours["norm"]["scale"][:] = 0
    assert np.all(tensors["norm.weight"] != 0)


def test_names_left_over_or_missing():
    tensors = make_tensors()
    extra = {**tensors, "head.weight": np.zeros((1, 1))}
    with pytest.raises(UserError, match=r"my\.ckpt .*tensors left over: 1 \(head\.weight\)"):
        to_ours(TABLE, extra, what="my.ckpt")
    to_ours(TABLE, extra, ignore=["head.weight"])
    to_ours(TABLE, tensors, ignore=["head.weight"])
    del tensors["norm.weight"]
    with pytest.raises(UserError, match=r"tensors missing: 1 \(norm\.weight\)"):
        to_ours(TABLE, tensors)


def test_parameters_left_over_or_missing():
    ours = to_ours(TABLE, make_tensors())
    with pytest.raises(UserError, match=r"parameters left over: 1 \(head\.kernel\)"):
        to_torch(TABLE, {**ours, "head": {"kernel": np.zeros((1, 1))}})
    del ours["norm"]
    with pytest.raises(UserError, match=r"parameters missing: 1 \(norm\.scale\)"):
        to_torch(TABLE, ours)


def test_shapes():
    tensors = make_tensors()
    like = to_ours(TABLE, tensors)
    to_ours(TABLE, tensors, like=like)
    wrong = {**tensors, "in.weight": np.zeros((4, 5), np.float32)}
    with pytest.raises(UserError, match=r"in\.weight gives embed\.kernel the shape \[5, 4\].*\[3, 4\]"):
        to_ours(TABLE, wrong, like=like)
    with pytest.raises(UserError, match=r"in\.weight has the shape \[4\], but 2 dimensions"):
        to_ours(TABLE, {**tensors, "in.weight": np.zeros(4)})
    with pytest.raises(UserError, match=r"layers\.4\.w\.weight has another shape"):
        to_ours(TABLE, {**tensors, "layers.4.w.weight": np.zeros((8, 4), np.float32)})
    with pytest.raises(UserError, match=r"layers\.3\.w\.weight of shape \[9, 4\]"):
        to_ours(TABLE, {**tensors, "layers.3.w.weight": np.zeros((9, 4), np.float32)})
    with pytest.raises(UserError, match="shapes differ"):
        to_ours(TABLE, {**tensors, "layers.3.k.weight": np.zeros((9, 4), np.float32)})
    deeper = {
        **like,
        "blocks": {**like["blocks"], "qk": {k: np.zeros((3, *a.shape[1:])) for k, a in like["blocks"]["qk"].items()}},
    }
    with pytest.raises(UserError, match="the model has 2 blocks"):
        to_torch(TABLE, deeper)


def test_a_model_with_other_parameters_is_refused():
    like = to_ours(TABLE, make_tensors())
    del like["norm"]
    with pytest.raises(UserError, match=r"missing: 1 \(norm\.scale\)"):
        to_ours(TABLE, make_tensors(), like=like)


def test_dtype():
    ours = flatten(to_ours(TABLE, make_tensors(), dtype=lambda path: np.float16 if "blocks" in path else np.float64))
    assert {path: a.dtype for path, a in ours.items()} == {
        path: np.float16 if path.startswith("blocks") else np.float64 for path in ours
    }
    assert flatten(unflatten(ours)).keys() == ours.keys()
