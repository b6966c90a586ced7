"""Weights of the 2015 Inception network from the two PyTorch files that carry them.

- `inception-2015-12-05.pt`: TorchScript, with the graph's own names; some copies come without the classifier.
- `pt_inception-2015-12-05-6726825d.pth`: a state dict with torchvision's names, classifier included.
"""

from __future__ import annotations

import pathlib

import numpy as np
from flax import nnx

from deco_jax.convert.mapping import flatten, unflatten
from deco_jax.convert.torch_files import read_tensors
from deco_jax.errors import UserError
from deco_jax.models.inception import NUM_CLASSES, POOL3_WIDTH, Inception
from deco_jax.run import fetch

BATCH_NORM_EPSILON = 1e-3

WHERE = (
    "get pt_inception-2015-12-05-6726825d.pth from github.com/mseitzer/pytorch-fid/releases (it also gives the "
    "Inception Score) or inception-2015-12-05.pt from StyleGAN's metrics"
)

# our unit -> torchvision's, inside each kind of block
_TOWER_3X3 = {f"tower_1.conv{s}": f"branch3x3dbl_{i}" for i, s in enumerate(["", "_1", "_2"], 1)}
_BLOCK_A = {
    "conv": "branch1x1",
    "tower.conv": "branch5x5_1",
    "tower.conv_1": "branch5x5_2",
    **_TOWER_3X3,
    "tower_2.conv": "branch_pool",
}
_BLOCK_B = {
    "conv": "branch3x3",
    "tower.conv": "branch3x3dbl_1",
    "tower.conv_1": "branch3x3dbl_2",
    "tower.conv_2": "branch3x3dbl_3",
}
_BLOCK_C = {
    "conv": "branch1x1",
    "tower.conv": "branch7x7_1",
    "tower.conv_1": "branch7x7_2",
    "tower.conv_2": "branch7x7_3",
    **{f"tower_1.conv{s}": f"branch7x7dbl_{i}" for i, s in enumerate(["", "_1", "_2", "_3", "_4"], 1)},
    "tower_2.conv": "branch_pool",
}
_BLOCK_D = {
    "tower.conv": "branch3x3_1",
    "tower.conv_1": "branch3x3_2",
    **{f"tower_1.conv{s}": f"branch7x7x3_{i}" for i, s in enumerate(["", "_1", "_2", "_3"], 1)},
}
_BLOCK_E = {
    "conv": "branch1x1",
    "tower_conv": "branch3x3_1",
    "tower_mixed_conv": "branch3x3_2a",
    "tower_mixed_conv_1": "branch3x3_2b",
    "tower_1_conv": "branch3x3dbl_1",
    "tower_1_conv_1": "branch3x3dbl_2",
    "tower_1_mixed_conv": "branch3x3dbl_3a",
    "tower_1_mixed_conv_1": "branch3x3dbl_3b",
    "tower_2_conv": "branch_pool",
}
_BLOCKS = {
    "mixed": ("Mixed_5b", _BLOCK_A),
    "mixed_1": ("Mixed_5c", _BLOCK_A),
    "mixed_2": ("Mixed_5d", _BLOCK_A),
    "mixed_3": ("Mixed_6a", _BLOCK_B),
    "mixed_4": ("Mixed_6b", _BLOCK_C),
    "mixed_5": ("Mixed_6c", _BLOCK_C),
    "mixed_6": ("Mixed_6d", _BLOCK_C),
    "mixed_7": ("Mixed_6e", _BLOCK_C),
    "mixed_8": ("Mixed_7a", _BLOCK_D),
    "mixed_9": ("Mixed_7b", _BLOCK_E),
    "mixed_10": ("Mixed_7c", _BLOCK_E),
}
TORCHVISION_NAMES = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
    **{
        f"{ours}.{unit}": f"{theirs}.{name}"
        for ours, (theirs, table) in _BLOCKS.items()
        for unit, name in table.items()
    },
}


def load_inception(path: str | pathlib.Path) -> dict:
    """Read either file into `Inception`'s parameters: a nested dict of float32 NumPy arrays.

    Batch-norm (eps 1e-3) is folded into kernel and bias in float64. The dict has "classifier" [2048, 1008] only if the
    file has one. Raises UserError for a missing, damaged or different file, naming keys that lack or are left over.
    """
    path = fetch.local(path)
    if not path.is_file():
        raise UserError(f"no Inception weights at {path}; {WHERE}")
    tensors = _read(path)
    if any(key.startswith("Conv2d_1a_3x3.") for key in tensors):
        kernel, mean, variance, beta, gamma = "conv.weight", "bn.running_mean", "bn.running_var", "bn.bias", "bn.weight"
        names, output, prefix = TORCHVISION_NAMES, "fc", ""
        # counts of training batches say nothing at inference; old files lack them
        tensors = {key: a for key, a in tensors.items() if not key.endswith("bn.num_batches_tracked")}
    else:
        kernel, mean, variance, beta, gamma = "weight", "mean", "var", "beta", None
        prefix = "net." if any(key.startswith("net.layers.") for key in tensors) else ""
        names, output = {ours: f"{prefix}layers.{ours}" for ours in TORCHVISION_NAMES}, f"{prefix}output"
    leaves = [leaf for leaf in (kernel, mean, variance, beta, gamma) if leaf]
    expected = {f"{name}.{leaf}" for name in names.values() for leaf in leaves}
    classifier = f"{output}.weight" in tensors
    if classifier:
        expected |= {f"{output}.weight", f"{output}.bias"}
    _check_names(path, expected, set(tensors))

    flat: dict[str, np.ndarray] = {}
    for ours, theirs in names.items():
        get = {leaf: tensors[f"{theirs}.{leaf}"].astype(np.float64) for leaf in leaves}
        if get[kernel].ndim != 4 or any(get[leaf].shape != get[kernel].shape[:1] for leaf in leaves if leaf != kernel):
            raise UserError(f"{path}: {theirs} has no convolution's shapes; {WHERE}")
        scale = (get[gamma] if gamma else 1.0) / np.sqrt(get[variance] + BATCH_NORM_EPSILON)
        flat[f"{ours}.kernel"] = (get[kernel].transpose(2, 3, 1, 0) * scale).astype(np.float32)
        flat[f"{ours}.bias"] = (get[beta] - get[mean] * scale).astype(np.float32)
    if classifier:
        # the bias is dropped: the suite's softmax goes without it
        weight = tensors[f"{output}.weight"].astype(np.float32)
        flat["classifier"] = weight.T if weight.shape == (NUM_CLASSES, POOL3_WIDTH) else weight
    _check_values(path, flat, classifier)
    return unflatten(flat)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read the tensors of a state dictionary or of a TorchScript module, whose code is not run."""
    try:
        return dict(read_tensors(path))
    except UserError as error:
        why = str(error).removeprefix(f"{path}: ").rpartition(";")[0]
        raise UserError(f"{path} is damaged or no PyTorch file of weights ({why}); {WHERE}") from error


def _check_names(path: pathlib.Path, expected: set[str], found: set[str]) -> None:
    complaints = [
        f"{word} {len(keys)}: {', '.join(sorted(keys)[:20])}{' ...' if len(keys) > 20 else ''}"
        for word, keys in (("missing", expected - found), ("left over", found - expected))
        if keys
    ]
    if complaints:
        raise UserError(f"{path} doesn't hold the 2015 Inception network: {'; '.join(complaints)}; {WHERE}")


def _check_values(path: pathlib.Path, flat: dict[str, np.ndarray], classifier: bool) -> None:
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Inception(classifier))))
    for name, shape in ((name, array.shape) for name, array in flatten(shapes).items()):
        if flat[name].shape != shape:
            raise UserError(f"{path}: {name} has shape {flat[name].shape}, the network's is {shape}; {WHERE}")
        if not np.isfinite(flat[name]).all():
            raise UserError(f"{path}: {name} holds values that are not finite: the file is damaged; {WHERE}")
