"""models/inception.py and inception_weights.py: resize, network and weight files against torch's functional ops."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from flax import nnx

from deco_jax.errors import UserError
from deco_jax.models.inception import FeatureExtractor, Inception, preprocess, resize_tf1
from deco_jax.models.inception_weights import load_inception
from tests.helpers import ROOT, fake_devices, golden, relative_error

torch = pytest.importorskip("torch")
F = torch.nn.functional

WEIGHTS = os.environ.get("DECO_JAX_INCEPTION")
needs_weights = pytest.mark.skipif(
    not WEIGHTS, reason="set DECO_JAX_INCEPTION to the path of the real inception-2015-12-05.pt (83 MiB, not shipped)"
)

# --- an independent network: torchvision's names and layer table, F.conv2d and F.batch_norm ---------------------------

A = [
    ("branch1x1", 0, 64, (1, 1)),
    ("branch5x5_1", 0, 48, (1, 1)),
    ("branch5x5_2", 48, 64, (5, 5)),
    ("branch3x3dbl_1", 0, 64, (1, 1)),
    ("branch3x3dbl_2", 64, 96, (3, 3)),
    ("branch3x3dbl_3", 96, 96, (3, 3)),
]
E = [
    ("branch1x1", 0, 320, (1, 1)),
    ("branch3x3_1", 0, 384, (1, 1)),
    ("branch3x3_2a", 384, 384, (1, 3)),
    ("branch3x3_2b", 384, 384, (3, 1)),
    ("branch3x3dbl_1", 0, 448, (1, 1)),
    ("branch3x3dbl_2", 448, 384, (3, 3)),
    ("branch3x3dbl_3a", 384, 384, (1, 3)),
    ("branch3x3dbl_3b", 384, 384, (3, 1)),
    ("branch_pool", 0, 192, (1, 1)),
]


def c_block(inner):
    row, column, n = (1, 7), (7, 1), inner
    return [
        ("branch1x1", 0, 192, (1, 1)),
        ("branch7x7_1", 0, n, (1, 1)),
        ("branch7x7_2", n, n, row),
        ("branch7x7_3", n, 192, column),
        ("branch7x7dbl_1", 0, n, (1, 1)),
        ("branch7x7dbl_2", n, n, column),
        ("branch7x7dbl_3", n, n, row),
        ("branch7x7dbl_4", n, n, column),
        ("branch7x7dbl_5", n, 192, row),
        ("branch_pool", 0, 192, (1, 1)),
    ]


LAYERS = {
    "": (
        0,
        [
            ("Conv2d_1a_3x3", 3, 32, (3, 3)),
            ("Conv2d_2a_3x3", 32, 32, (3, 3)),
            ("Conv2d_2b_3x3", 32, 64, (3, 3)),
            ("Conv2d_3b_1x1", 64, 80, (1, 1)),
            ("Conv2d_4a_3x3", 80, 192, (3, 3)),
        ],
    ),
    "Mixed_5b.": (192, [*A, ("branch_pool", 0, 32, (1, 1))]),
    "Mixed_5c.": (256, [*A, ("branch_pool", 0, 64, (1, 1))]),
    "Mixed_5d.": (288, [*A, ("branch_pool", 0, 64, (1, 1))]),
    "Mixed_6a.": (
        288,
        [
            ("branch3x3", 0, 384, (3, 3)),
            ("branch3x3dbl_1", 0, 64, (1, 1)),
            ("branch3x3dbl_2", 64, 96, (3, 3)),
            ("branch3x3dbl_3", 96, 96, (3, 3)),
        ],
    ),
    "Mixed_6b.": (768, c_block(128)),
    "Mixed_6c.": (768, c_block(160)),
    "Mixed_6d.": (768, c_block(160)),
    "Mixed_6e.": (768, c_block(192)),
    "Mixed_7a.": (
        768,
        [
            ("branch3x3_1", 0, 192, (1, 1)),
            ("branch3x3_2", 192, 320, (3, 3)),
            ("branch7x7x3_1", 0, 192, (1, 1)),
            ("branch7x7x3_2", 192, 192, (1, 7)),
            ("branch7x7x3_3", 192, 192, (7, 1)),
            ("branch7x7x3_4", 192, 192, (3, 3)),
        ],
    ),
    "Mixed_7b.": (1280, E),
    "Mixed_7c.": (2048, E),
}


def random_state_dict() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    state = {}
    for prefix, (width, rows) in LAYERS.items():
        for name, width_in, width_out, kernel in rows:
            shape = (width_out, width_in or width, *kernel)
            key = f"{prefix}{name}."
            scale = np.float32(np.sqrt(2 / np.prod(shape[1:])))
            state[f"{key}conv.weight"] = rng.standard_normal(shape, np.float32) * scale
            state[f"{key}bn.weight"] = rng.uniform(0.8, 1.2, width_out).astype(np.float32)
            state[f"{key}bn.bias"] = rng.normal(0, 0.1, width_out).astype(np.float32)
            state[f"{key}bn.running_mean"] = rng.normal(0, 0.1, width_out).astype(np.float32)
            # near the epsilon for some channels, so that another epsilon would show
            state[f"{key}bn.running_var"] = rng.uniform(0.01, 1.5, width_out).astype(np.float32)
            state[f"{key}bn.num_batches_tracked"] = np.array(7)
    state["fc.weight"] = rng.standard_normal((1008, 2048), np.float32) * np.float32(0.05)
    state["fc.bias"] = rng.standard_normal(1008, np.float32)
    return state


def reference_network(state, images):
    """float64 [n, 3, h, w] -> pool3, spatial, log-softmax."""
    state = {key: torch.from_numpy(a).double() for key, a in state.items()}

    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding)
        mean, variance = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
        return F.relu(F.batch_norm(x, mean, variance, state[f"{name}.bn.weight"], state[f"{name}.bn.bias"], eps=1e-3))

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def block_a(x, m):
        five = conv(conv(x, f"{m}.branch5x5_1"), f"{m}.branch5x5_2", 1, 2)
        three = conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", 1, 1)
        three = conv(three, f"{m}.branch3x3dbl_3", 1, 1)
        return torch.cat([conv(x, f"{m}.branch1x1"), five, three, conv(average(x), f"{m}.branch_pool")], 1)

    def block_c(x, m):
        one = conv(x, f"{m}.branch1x1")
        seven = conv(conv(x, f"{m}.branch7x7_1"), f"{m}.branch7x7_2", 1, (0, 3))
        seven = conv(seven, f"{m}.branch7x7_3", 1, (3, 0))
        double = conv(x, f"{m}.branch7x7dbl_1")
        for i, padding in enumerate([(3, 0), (0, 3), (3, 0), (0, 3)], 2):
            double = conv(double, f"{m}.branch7x7dbl_{i}", 1, padding)
        return torch.cat([one, seven, double, conv(average(x), f"{m}.branch_pool")], 1), one

    def block_e(x, m, pooled):
        three = conv(x, f"{m}.branch3x3_1")
        double = conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", 1, 1)
        parts = [conv(x, f"{m}.branch1x1")]
        parts += [conv(three, f"{m}.branch3x3_2a", 1, (0, 1)), conv(three, f"{m}.branch3x3_2b", 1, (1, 0))]
        parts += [conv(double, f"{m}.branch3x3dbl_3a", 1, (0, 1)), conv(double, f"{m}.branch3x3dbl_3b", 1, (1, 0))]
        return torch.cat([*parts, conv(pooled, f"{m}.branch_pool")], 1)

    x = conv(conv(torch.from_numpy(images).double(), "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3")
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3", 1, 1), 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = block_a(x, m)
    double = conv(conv(x, "Mixed_6a.branch3x3dbl_1"), "Mixed_6a.branch3x3dbl_2", 1, 1)
    double = conv(double, "Mixed_6a.branch3x3dbl_3", 2)
    x = torch.cat([conv(x, "Mixed_6a.branch3x3", 2), double, F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x, first = block_c(x, m)
        if m == "Mixed_6d":
            spatial = first[:, :7].permute(0, 2, 3, 1).flatten(1)
    three = conv(conv(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", 2)
    seven = conv(conv(x, "Mixed_7a.branch7x7x3_1"), "Mixed_7a.branch7x7x3_2", 1, (0, 3))
    seven = conv(conv(seven, "Mixed_7a.branch7x7x3_3", 1, (3, 0)), "Mixed_7a.branch7x7x3_4", 2)
    x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
    x = block_e(x, "Mixed_7b", average(x))
    x = block_e(x, "Mixed_7c", F.max_pool2d(x, 3, 1, 1))
    pool3 = x.mean((2, 3))
    return [a.numpy() for a in (pool3, spatial, F.log_softmax(pool3 @ state["fc.weight"].T, 1))]


def script_names(state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The same weights under the names of the TorchScript file, whose batch-norm has no gamma."""
    from deco_jax.models.inception_weights import TORCHVISION_NAMES

    leaves = {"conv.weight": "weight", "bn.running_mean": "mean", "bn.running_var": "var", "bn.bias": "beta"}
    return {
        f"{prefix}layers.{ours}.{new}": state[f"{theirs}.{old}"]
        for ours, theirs in TORCHVISION_NAMES.items()
        for old, new in leaves.items()
    }


def save(state: dict[str, np.ndarray], path: pathlib.Path) -> pathlib.Path:
    torch.save({key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def state():
    return random_state_dict()


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    """A file in the layout of pt_inception-2015-12-05-6726825d.pth."""
    return save(state, tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="module")
def params(weights):
    return load_inception(weights)


# --- resize ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(32, 32), (24, 40), (1, 3), (298, 300), (384, 512)])
def test_resize_against_the_formula(height, width):
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    expected = image[0].astype(np.float64)
    for axis in (0, 1):
        n = expected.shape[axis]
        position = np.arange(299) * n / 299
        low = np.floor(position).astype(int)
        share = (position - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, n - 1)
        expected = np.take(expected, low, axis) * (1 - share) + np.take(expected, high, axis) * share
    actual = np.asarray(resize_tf1(image))[0]
    assert actual.dtype == np.float32
    assert relative_error(actual, expected) < 5e-5  # positions are float32, as in the graph


def test_resize_of_the_final_size_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), dtype=np.uint8)
    assert np.array_equal(resize_tf1(image), image)


@pytest.mark.parametrize("name", ["small", "large"])
def test_resize_golden(name):
    values = golden("inception_pool3")
    corner = np.asarray(resize_tf1(values[f"{name}/images"]))[:, :8, :8]
    assert relative_error(corner, values[f"{name}/resized_corner"]) < 1e-6


def test_range():
    image = np.array([0, 128, 255], np.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_array_equal(np.asarray(preprocess(image))[0, 5, 5], [-1, 0, 127 / 128])


# --- network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, low, high", [("float32", 0, 1e-5), ("bfloat16", 1e-4, 5e-2)])
def test_network_against_torch(state, params, dtype, low, high):
    images = np.random.default_rng(1).uniform(-1, 1, (1, 107, 139, 3)).astype(np.float32)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Inception(dtype=dtype)))

    @jax.jit
    def apply(params, images):
        return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))(images)

    actual = apply(params, images)
    for ours, theirs in zip(actual, reference_network(state, images.transpose(0, 3, 1, 2)), strict=True):
        assert ours.dtype == np.float32
        assert low <= relative_error(ours, theirs) < high


def test_extractor_pads_the_last_batch(state, params):
    images = np.random.default_rng(2).integers(0, 256, (3, 20, 36, 3), dtype=np.uint8)
    features = FeatureExtractor(params, batch_size=2)(images)
    expected = reference_network(state, np.array(preprocess(images)).transpose(0, 3, 1, 2))
    for ours, theirs, width in zip(features, expected, (2048, 2023, 1008), strict=True):
        assert isinstance(ours, np.ndarray)
        assert ours.shape == (3, width)
        assert relative_error(ours, theirs) < 1e-5
    assert FeatureExtractor(params)(images[:0]).pool3.shape == (0, 2048)


def test_mesh_of_four_agrees_with_one(weights):
    program = """
        import jax, numpy as np
        from deco_jax.models.inception_weights import load_inception
        from deco_jax.models.inception import FeatureExtractor
        from deco_jax.evaluation.precision_recall import precision_recall
        from tests.test_precision_recall import neighbour_radii
        mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
        params = load_inception(%r)
        split = FeatureExtractor(params, batch_size=3, mesh=mesh)
        assert split.batch_size == 4
        for a, b in zip(FeatureExtractor(params, batch_size=2)(images), split(images), strict=True):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
        a, b = (rng.standard_normal((n, 64), np.float32) for n in (90, 70))
        assert precision_recall(a, b, row_block=30, column_block=50, mesh=mesh) == precision_recall(a, b)
        near = neighbour_radii(a, mesh=mesh, row_block=20)
        assert np.abs(near - neighbour_radii(a)).max() < 1e-4
        print("agrees")
    """
    env = {**os.environ, **fake_devices(4)}
    command = [sys.executable, "-c", textwrap.dedent(program) % str(weights)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "agrees", done.stderr[-2000:]


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((1, 8, 8, 3), np.float32), "float32 values; the Inception network takes uint8"),
        (np.zeros((8, 8, 3), np.uint8), r"shape (8, 8, 3); expected [images, height, width, 3]"),
        (np.zeros((1, 3, 8, 8), np.uint8), "shape (1, 3, 8, 8)"),
        (np.zeros((1, 0, 8, 3), np.uint8), "shape (1, 0, 8, 3)"),
    ],
)
def test_bad_images(params, images, message):
    with pytest.raises(UserError, match=re.escape(message)):
        FeatureExtractor(params)(images)


# --- weight files ----------------------------------------------------------------------------------------------------


def test_script_names_give_the_same_network(state, params, tmp_path):
    """The two files' layouts, from one set of weights with gamma 1."""
    plain = {key: np.ones_like(a) if key.endswith("bn.weight") else a for key, a in state.items()}
    expected = load_inception(save(plain, tmp_path / "a.pth"))
    for prefix, weight in (("", plain["fc.weight"]), ("net.", plain["fc.weight"].T)):
        renamed = script_names(plain, prefix)
        renamed |= {f"{prefix}output.weight": weight, f"{prefix}output.bias": plain["fc.bias"]}
        actual = load_inception(save(renamed, tmp_path / "b.pth"))
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_without_classifier_there_is_no_softmax(state, tmp_path):
    path = save(script_names(state, "net."), tmp_path / "a.pth")
    params = load_inception(path)
    assert "classifier" not in params
    features = FeatureExtractor(params, batch_size=1)(np.zeros((1, 8, 8, 3), np.uint8))
    assert features.log_softmax is None
    assert features.pool3.shape == (1, 2048)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_file(state, tmp_path):
    """A real TorchScript archive, one submodule a dot, as the published file is."""
    root = torch.nn.Module()
    for key, array in script_names(state, "").items():
        *parts, leaf = key.split(".")
        node = root
        for part in parts:
            if part not in dict(node.named_children()):
                node.add_module(part, torch.nn.Module())
            node = node.get_submodule(part)
        node.register_buffer(leaf, torch.from_numpy(array))
    torch.jit.script(root).save(str(tmp_path / "a.pt"))
    expected = load_inception(save(script_names(state, ""), tmp_path / "a.pth"))
    jax.tree.map(np.testing.assert_array_equal, load_inception(tmp_path / "a.pt"), expected)


def test_strict_both_ways(state, tmp_path):
    wrong = {key: a for key, a in state.items() if key != "Mixed_6d.branch1x1.bn.running_var"}
    wrong["AuxLogits.fc.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as error:
        load_inception(save(wrong, tmp_path / "a.pth"))
    assert "missing 1: Mixed_6d.branch1x1.bn.running_var" in str(error.value)
    assert "left over 1: AuxLogits.fc.weight" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("fc.weight", np.zeros((1000, 2048), np.float32), "classifier has shape (1000, 2048)"),
        ("Conv2d_1a_3x3.conv.weight", np.zeros((32, 4, 3, 3), np.float32), "conv.kernel has shape (3, 3, 4, 32)"),
        ("Conv2d_1a_3x3.bn.bias", np.zeros(31, np.float32), "Conv2d_1a_3x3 has no convolution's shapes"),
        ("Conv2d_1a_3x3.bn.bias", np.full(32, np.nan, np.float32), "not finite"),
    ],
)
def test_wrong_values(state, tmp_path, key, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_inception(save({**state, key: value}, tmp_path / "a.pth"))


def test_missing_and_damaged_files(weights, tmp_path):
    with pytest.raises(UserError, match=r"no Inception weights at .*; get pt_inception"):
        load_inception(tmp_path / "none.pt")
    damaged = tmp_path / "damaged.pt"
    for content in (b"", b"not a weight file", weights.read_bytes()[:1_000_000]):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="damaged or no PyTorch file") as error:
            load_inception(damaged)
        assert "\n" not in str(error.value)
    torch.save([torch.zeros(3)], damaged)
    with pytest.raises(UserError, match="holds a list, not a dictionary of weights"):
        load_inception(damaged)


def test_without_torch(weights, params, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    jax.tree.map(np.testing.assert_array_equal, load_inception(weights), params)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_code_of_a_script_is_not_run(state, tmp_path):
    """A module whose loading runs for ever, which PyTorch would do before it gives its tensors."""

    class Hangs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for key, array in script_names(state, "").items():
                self.register_buffer(key.replace(".", "_"), torch.from_numpy(array))

        @torch.jit.export
        def __getstate__(self):
            return (torch.zeros(1), self.training)

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]):
            while True:
                pass

        def forward(self, x):
            return x

    torch.jit.script(Hangs()).save(str(tmp_path / "a.pt"))
    with pytest.raises(UserError, match="damaged or no PyTorch file"):
        load_inception(tmp_path / "a.pt")


# --- the real weights ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return FeatureExtractor(load_inception(WEIGHTS), batch_size=5)


@needs_weights
@pytest.mark.parametrize("name", ["small", "large"])
def test_pool3_golden(real, name):
    values = golden("inception_pool3")
    features = real(values[f"{name}/images"])
    assert relative_error(features.pool3, values[f"{name}/pool3"]) < 1e-5


@needs_weights
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_real_spatial_features(real):
    script = torch.jit.load(WEIGHTS).state_dict()
    prefix = "net." if any(key.startswith("net.") for key in script) else ""
    from deco_jax.models.inception_weights import TORCHVISION_NAMES

    leaves = {"conv.weight": "weight", "bn.running_mean": "mean", "bn.running_var": "var", "bn.bias": "beta"}
    state = {}
    for ours, theirs in TORCHVISION_NAMES.items():
        state |= {f"{theirs}.{old}": script[f"{prefix}layers.{ours}.{new}"].numpy() for old, new in leaves.items()}
        state[f"{theirs}.bn.weight"] = np.ones_like(state[f"{theirs}.bn.bias"])
    state["fc.weight"] = np.zeros((1008, 2048), np.float32)
    images = golden("inception_pool3")["large/images"]
    pool3, spatial, _ = reference_network(state, np.array(preprocess(images)).transpose(0, 3, 1, 2))
    features = real(images)
    assert relative_error(features.spatial, spatial) < 1e-5
    assert relative_error(features.pool3, pool3) < 1e-5
