"""The small parts that every network here is made of.

Parameters are float32 and are cast to the compute dtype where they are used; normalisations and
softmaxes run in float32. Linear layers start as PyTorch's do (the reference implementation never says
otherwise, so its defaults are part of the recipe): weights and biases uniform within ±1/√fan_in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers

from deco_jax.run.devices import gather, on_tpu
from deco_jax.shapes import Angles, Heads, Maps, Patches, PerExample

Dtype = Any

KEPT = "kept"  # the name of what such a policy may keep: as wide as the hidden states, and dear to compute
GATHERED = "gathered"  # that of a parameter that was made whole

REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,  # keep every activation for the backward pass
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the matrix products' outputs
    "attention": jax.checkpoint_policies.save_only_these_names(KEPT),  # keep the outputs of attention and the MLP
    "full": jax.checkpoint_policies.nothing_saveable,  # keep each block's input only
}


def kept(x: jax.Array) -> jax.Array:
    """Mark x as what remat=attention keeps for the backward pass."""
    return checkpoint_name(x, KEPT)


def uniform(bound: float) -> Callable:
    """Return an initializer: uniform in ±bound."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialize


SUBLANES = 8  # rows of a TPU's register

xavier = initializers.xavier_uniform()
zeros = initializers.zeros


class Linear(nnx.Linear):
    """A linear layer [..., fan_in] → [..., fan_out] that starts uniform within ±1/√fan_in unless told otherwise.

    It multiplies plain matrices, [rows, fan_in] by [fan_in, fan_out]: with more axes XLA on a CPU writes a transposed
    copy of the output's gradient before it multiplies for the weights'.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        *,
        dtype: Dtype,
        rngs: nnx.Rngs,
        use_bias: bool = True,
        kernel_init: Callable | None = None,
        bias_init: Callable | None = None,
    ) -> None:
        default = uniform(1 / math.sqrt(fan_in))
        super().__init__(
            fan_in,
            fan_out,
            use_bias=use_bias,
            dtype=dtype,
            rngs=rngs,
            kernel_init=kernel_init or default,
            bias_init=bias_init or default,
        )
        self.kernel.set_metadata(used_as=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # arrays are sharded by jit alone
        if on_tpu():  # where the rows' axes may lie apart in memory
            if x.size > x.shape[-1]:
                return super().__call__(x)
            # XLA multiplies a single row on the vector unit, 75 µs for [1152, 6912] instead of 30 (its estimate, v5e).
            rows = jnp.pad(x.reshape(1, -1), ((0, SUBLANES - 1), (0, 0)))
            return super().__call__(rows)[:1].reshape(*x.shape[:-1], -1)
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    def to_heads(self, x: jax.Array, num_heads: int, parts: int) -> list[jax.Array]:
        """x [batch, tokens, fan_in] → `parts` arrays [batch, tokens, heads, head_width], which lie side by side in
        the output."""
        if not on_tpu():
            y = self(x).reshape(*x.shape[:-1], parts, num_heads, -1)
            return [y[..., part, :, :] for part in range(parts)]
        # A product each, heads apart: one output of all would be copied into the layout that attention takes.
        kernel = self.kernel[...].astype(self.dtype).reshape(x.shape[-1], parts, num_heads, -1)
        outputs = [jnp.einsum("bte,ehd->bthd", x, kernel[:, part]) for part in range(parts)]
        if self.bias is None:
            return outputs
        bias = self.bias[...].astype(self.dtype).reshape(parts, num_heads, -1)
        return [y + bias[part] for part, y in enumerate(outputs)]

    def to_heads_down(self, x: jax.Array, num_heads: int, parts: int) -> list[jax.Array]:
        """`to_heads` with tokens along the last axis: `parts` arrays [batch, heads, head_width, tokens]."""
        kernel = self.kernel[...].astype(self.dtype).reshape(x.shape[-1], parts, num_heads, -1)
        # `split`, because its derivative puts the parts' gradients together in one pass.
        outputs = [jnp.einsum("bte,ehd->bhdt", x, part[:, 0]) for part in jnp.split(kernel, parts, axis=1)]
        if self.bias is None:
            return outputs
        bias = self.bias[...].astype(self.dtype).reshape(parts, num_heads, -1, 1)
        return [y + bias[part] for part, y in enumerate(outputs)]

    def from_heads_down(self, x: jax.Array) -> jax.Array:
        """x [batch, heads, head_width, tokens] → [batch, tokens, fan_out], of all heads' channels."""
        kernel = self.kernel[...].astype(self.dtype).reshape(*x.shape[1:3], -1)
        y = jnp.einsum("bhdt,hde->bte", x, kernel)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    def from_heads(self, x: jax.Array) -> jax.Array:
        """x [batch, tokens, heads, head_width] → [batch, tokens, fan_out], of all heads' channels."""
        if not on_tpu():
            return self(x.reshape(*x.shape[:2], -1))
        kernel = self.kernel[...].astype(self.dtype).reshape(*x.shape[2:], -1)
        y = jnp.einsum("bthd,hde->bte", x, kernel)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis, in float32; returns the input's dtype."""

    def __init__(self, width: int, *, epsilon: float = 1e-6) -> None:
        self.scale = nnx.Param(jnp.ones(width))
        self.epsilon = epsilon

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...]).astype(x.dtype)


@jax.named_scope("norm")
def normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Normalise over the last axis without learned parameters, in float32; returns the input's dtype."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """`normalize` followed by a learned scale and bias; returns the input's dtype."""

    def __init__(self, width: int, *, epsilon: float = 1e-6) -> None:
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        y = normalize(x.astype(jnp.float32), self.epsilon)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)).

    Args:
        xavier_init: start Xavier-uniform with zero biases, gate and up as the one matrix that they are elsewhere.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        use_bias: bool = False,
        xavier_init: bool = False,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ) -> None:
        joined = uniform(math.sqrt(6 / (width + 2 * hidden))) if xavier_init else None
        single, bias = (xavier, zeros) if xavier_init else (None, None)
        options = {"use_bias": use_bias, "bias_init": bias, "dtype": dtype, "rngs": rngs}
        self.gate = Linear(width, hidden, kernel_init=joined, **options)
        self.up = Linear(width, hidden, kernel_init=joined, **options)
        self.down = Linear(hidden, width, kernel_init=single, **options)

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array, drop_hidden: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """x [..., width] → its shape; `drop_hidden` is applied to the hidden units."""
        hidden = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(hidden if drop_hidden is None else drop_hidden(hidden))


class TimestepEmbedding(nnx.Module):
    """Times in [0, 1] to vectors: 256 cosines and sines, then Linear–SiLU–Linear.

    The frequencies are period^(−k/128), k = 0..127. DeCo's period is 10 (not the usual 10,000), and its times are not
    rescaled to 0..1000. Cosines come first.
    """

    WAVES = 128

    def __init__(
        self, width: int, *, period: float = 10.0, bias_init: Callable | None = None, dtype: Dtype, rngs: nnx.Rngs
    ) -> None:
        self.period = period
        normal = initializers.normal(0.02)
        self.hidden = Linear(2 * self.WAVES, width, kernel_init=normal, bias_init=bias_init, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, kernel_init=normal, bias_init=bias_init, dtype=dtype, rngs=rngs)

    def __call__(self, times: PerExample) -> jax.Array:
        """times [batch] → [batch, width]."""
        return self.out(jax.nn.silu(self.hidden(waves(times, self.period))))


def waves(numbers: jax.Array, period: float) -> jax.Array:
    """Return 128 cosines, then 128 sines, of numbers [...] at the frequencies period^(−k/128): float32 [..., 256]."""
    count = TimestepEmbedding.WAVES
    frequencies = jnp.asarray(period ** (-np.arange(count) / count), jnp.float32)
    angles = numbers.astype(jnp.promote_types(numbers.dtype, jnp.float32))[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotary_angles(xs: np.ndarray, ys: np.ndarray, head_width: int) -> np.ndarray:
    """Return the angles of the two-dimensional rotary position embedding.

    Args:
        xs, ys: horizontal positions [columns] and vertical positions [rows].
        head_width: channels a head, a multiple of 4.

    Returns:
        float32 [rows · columns, head_width / 2], row by row: for each frequency
        10000^(−k/head_width), k = 0, 4, 8, ..., the x angle and then the y angle.
    """
    frequencies = 10000.0 ** (-np.arange(0, head_width, 4) / head_width)
    x, y = np.meshgrid(xs, ys)  # [rows, columns]
    angles = np.stack([x[..., None] * frequencies, y[..., None] * frequencies], axis=-1)
    return angles.reshape(x.size, head_width // 2).astype(np.float32)


def rotate(x: Heads, angles: Angles) -> Heads:
    """Turn each pair of adjacent channels (2i, 2i+1) by its angle.

    Args:
        x: [batch, tokens, heads, head_width]; angles: [tokens, head_width / 2].
    """
    if on_tpu():
        # x·cos + (x·R)·sin: an axis of two would leave a register's other 126 lanes empty. R swaps the channels of a
        # pair and changes a sign, so the product is exact in any dtype.
        swap = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]])
        swapped = jnp.matmul(x, jnp.asarray(swap, x.dtype), precision="highest")
        cos, sin = (jnp.repeat(f(angles), 2, axis=-1)[:, None] for f in (jnp.cos, jnp.sin))
        return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)
    even, odd = jnp.split(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2), 2, axis=-1)
    cos, sin = (f(angles)[:, None, :, None] for f in (jnp.cos, jnp.sin))
    turned = jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Return x · (1 + scale) + shift (adaptive layer normalisation; Peebles & Xie 2023, §3.2)."""
    return x * (1 + scale) + shift


def is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def stack(make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Make `depth` independently initialised blocks, as one module whose parameters have a leading depth axis."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return make_block(rngs)

    blocks = make(rngs)
    for variable in jax.tree.leaves(blocks, is_leaf=is_variable):
        variable.set_metadata(stacked=True)
    return blocks


def gather_parameters(parameters: Any, *, stacks: bool) -> Any:
    """Make parameters whole on this device (`devices.gather`).

    Args:
        parameters: a tree of nnx.Variable with their whole shape as metadata, `whole_shape`, unless they are whole.
        stacks: also those of stacks, whose blocks `run_stack` would otherwise gather one by one.
    """

    def whole(variable: nnx.Variable) -> nnx.Variable:
        about = variable.get_metadata()
        if about.get("stacked") and not stacks:
            return variable
        value = variable.get_value()
        return variable.replace(gather(value, about.get("whole_shape", value.shape), about.get("used_as")))

    return jax.tree.map(whole, parameters, is_leaf=is_variable)


def run_stack(
    blocks: nnx.Module,
    x: Any,
    apply: Callable[[Any, Any], Any],
    *,
    start: int = 0,
    stop: int | None = None,
    dtype: Dtype = jnp.float32,
    remat: str = "none",
    unroll: int = 1,
) -> Any:
    """Send x through blocks start..stop of a stack, one `lax.scan`.

    Matrices are cast to the compute dtype before the scan: once a step instead of once a block and pass. Vectors (norm
    scales, biases) stay float32. Where a device holds only its part of the parameters, each block's are gathered when
    its turn comes, in the compute dtype, and again in the backward pass whatever `remat` says: kept for it, they would
    be all of the network on every device.

    Args:
        blocks: from `stack`.
        x: an array, or a tree of them.
        apply: (block, x) → x.
        remat: a name in REMAT_POLICIES.
        unroll: blocks a loop iteration.
    """

    def select(parameter: jax.Array) -> jax.Array:
        if parameter.ndim >= 3:
            parameter = parameter.astype(dtype)
        return parameter[start:stop]

    def block_shape(variable: nnx.Variable) -> tuple[int, ...]:
        return variable.get_metadata().get("whole_shape", variable.get_value().shape)[1:]

    split = any(
        variable.get_value().shape[1:] != block_shape(variable)
        for variable in jax.tree.leaves(blocks, is_leaf=is_variable)
    )

    def whole(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(checkpoint_name(gather(variable.get_value(), block_shape(variable)), GATHERED))

    def body(x: Any, block: nnx.Module) -> tuple[Any, None]:
        return apply(jax.tree.map(whole, block, is_leaf=is_variable) if split else block, x), None

    policy = REMAT_POLICIES[remat]
    if policy is None and split:
        policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    if policy is not None:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    x, _ = jax.lax.scan(body, x, jax.tree.map(select, blocks), unroll=unroll)
    return x


def patchify(images: Maps, patch: int) -> Patches:
    """Cut [batch, height, width, channels] into [batch, tokens, patch², channels], tokens and pixels row by row."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch, channels)


def unpatchify(patches: Patches, patch: int, height: int, width: int) -> Maps:
    """[batch, tokens, patch², channels] → [batch, height, width, channels]; undoes `patchify`."""
    batch, _, _, channels = patches.shape
    x = patches.reshape(batch, height // patch, width // patch, patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
