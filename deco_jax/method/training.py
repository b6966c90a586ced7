"""The training step over the mesh: the objective's gradient, the optimizer, the averages.

It minimises the sum over the losses from `method.objective`. The context is labels, or the frozen text encoder's
features of captions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from deco_jax import interrupts
from deco_jax.conditioning.condition import Condition, abstract_condition
from deco_jax.data.transforms import image_sides
from deco_jax.method import balance, lora
from deco_jax.method.averages import update_average
from deco_jax.method.objective import Method, make_method
from deco_jax.method.optimizer import make_optimizer
from deco_jax.method.step import Draws, Observed
from deco_jax.models import network as network_lib
from deco_jax.models.network import Network, Params
from deco_jax.run import choices, distributed, hardware, sharding
from deco_jax.run.state import State, state_shapes

Metrics = dict[str, jax.Array]
Batch = dict[str, jax.Array]
Frozen = dict[str, Any]  # arrays that a step reads, by name


class Observer(Protocol):
    """Computes what is known about a batch besides its images."""

    def __call__(self, frozen: dict[str, Any], batch: Batch, method: Method | None = None) -> Observed:
        """Observe a batch.

        Args:
            frozen: arrays by name.
            method: its losses say which features are needed; None: the config's method.
        """
        ...


PRIOR = "prior"  # bool [batch] of a batch: which images are those of config.data.prior_path

COMPILER = "the compiler"

# Keeps the noise of training separate from that of samples, whose keys come from the seed and an index below this.
TRAINING = 2**31


def make_train_step(
    networks: dict[str, Network],
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    observe: Observer,
    mesh: Mesh | None = None,
    start: int = 0,
) -> Callable[[State, Batch, dict[str, Any]], tuple[State, Metrics]]:
    """Make the step (state, batch, frozen) → (state, metrics), to be jitted with the state donated.

    `frozen` has the arrays that `observe` needs: weights of the teacher and the text encoder, null features; and the
    parameters of the denoiser that config.lora leaves frozen.

    A step with a non-finite loss or gradient changes no weight; it is counted in state["skipped"].

    Args:
        mesh: None: one device.
        start: steps done before it is first run. Losses that have ended by then are left out, with what they need.
    """
    method = make_method(config).at(start)
    with_networks = [functools.partial(f, networks=networks) for f in (method.objective, method.groups)]
    objective, groups = (lora.with_base(config, f) for f in with_networks)
    gradient = jax.value_and_grad(objective, has_aux=True)
    accumulate, output = config.optimizer.accumulate_steps, network_lib.architecture(config.model.name).output

    def of_rows(params: Any, batch: Batch, draws: Draws, frozen: Frozen, measured: Frozen) -> tuple[Any, Any]:
        given = (batch["image"], draws, observe(frozen, batch, method), frozen, measured)
        (loss, parts), grads = gradient(params, *given)
        found = {"params": grads}
        if method.balance is not None:
            found["balance"] = jax.lax.cond(
                measured["due"],
                lambda: balance.output_gradients(lambda params: groups(params, *given), params, output),
                lambda: balance.zeros(params, output),
            )
        return {"loss": loss, **parts}, found

    def loss_and_gradient(params: Any, batch: Batch, draws: Draws, frozen: Frozen, measured: Frozen) -> tuple[Any, Any]:
        """Compute loss and gradient of the given rows, a device's share of the batch."""
        if accumulate == 1:
            return of_rows(params, batch, draws, frozen, measured)
        # Part i takes every accumulate-th row, so that each device works on its own rows in every part.
        parts = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, accumulate, *a.shape[1:]), 0, 1), (batch, draws))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            part_batch, part_draws = part
            return jax.tree.map(jnp.add, total, of_rows(params, part_batch, part_draws, frozen, measured)), None

        batch, draws = jax.tree.map(lambda a: a[0], parts)
        zeros = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(of_rows, params, batch, draws, frozen, measured)
        )
        summed, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda a: a / accumulate, summed)

    def over_mesh(params: Any, batch: Batch, draws: Draws, frozen: Frozen, measured: Frozen) -> tuple[Any, Any]:
        if mesh is None:
            return loss_and_gradient(params, batch, draws, frozen, measured)
        placed = {"params": sharding.specs(mesh, params)}
        if method.balance is not None:
            placed["balance"] = balance.placed_like(placed["params"], output)

        def local(*arguments: Any) -> tuple[Any, Any]:
            metrics, grads = loss_and_gradient(*arguments)
            return sharding.mean_over_devices(metrics, mesh), sharding.reduce_gradients(grads, placed, mesh)

        arguments = (placed["params"], sharding.BATCH, sharding.BATCH, sharding.specs(mesh, frozen), sharding.WHOLE)
        return sharding.each_device(local, mesh, arguments, (sharding.WHOLE, placed))(
            params, batch, draws, frozen, measured
        )

    def train_step(state: State, batch: Batch, frozen: Frozen) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), TRAINING), state["step"])
        draws = method.draw(key, batch["image"].shape, state["step"])
        if PRIOR in batch:
            draws = method.weighted(draws, jnp.where(batch[PRIOR], config.loss.prior_weight, 1.0))
        measured = state.get("measured", {})
        due = {} if method.balance is None else {"due": method.balance.due(state["step"] + 1)}
        metrics, found = over_mesh(state["params"], batch, draws, frozen, measured | due)
        grads = found["params"]

        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            seen = (state["step"] + 1).astype(jnp.float32) * len(batch["image"])
            averages = {
                name: update_average(
                    state["averages"][name], params["denoiser"], average.decay(seen, len(batch["image"]))
                )
                for name, average in method.averages.items()
            }

            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
            changed = {"params": params, "averages": averages, "opt_state": opt_state}
            kept = {name: state[name] for name in changed}
            new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
        if measured:
            new_state["measured"] = measured
        if method.balance is not None:
            factor = measured[balance.NAME]
            metrics[balance.NAME] = factor
            after = method.balance.after(factor, due["due"], found["balance"])
            new_state["measured"] = measured | {balance.NAME: after}
        new_state["step"] = state["step"] + 1
        new_state["skipped"] = jnp.where(finite, 0, state["skipped"] + 1)
        return new_state, {**metrics, "gradient_norm": norm, "skipped": new_state["skipped"]}

    return train_step


def lower_train_step(
    networks: dict[str, Network],
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    observe: Observer,
    mesh: Mesh,
    state: State,
    batch: dict[str, Any],
    frozen: dict[str, Any],
    start: int = 0,
) -> jax.stages.Lowered:
    """Lower `make_train_step` for a state, batch and frozen arrays (or their shapes with shardings)."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
        make_train_step(networks, optimizer, config, observe, mesh, start),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    return step.lower(state, batch, frozen)


def batch_shapes(
    config: ml_collections.ConfigDict, mesh: Mesh, condition: Condition
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a global batch as ShapeDtypeStructs with shardings."""
    samples = {"image": ((*image_sides(config.data.image_size), 3), jnp.uint8), **condition.inputs}
    if config.data.get("prior_path"):
        samples[PRIOR] = ((), jnp.bool_)
    size, placed = config.data.batch_size, sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=placed) for name, (shape, dtype) in samples.items()
    }


def choose_remat(
    config: ml_collections.ConfigDict, mesh: Mesh, condition: Condition
) -> tuple[ml_collections.ConfigDict, choices.Remat | None]:
    """Resolve config.model.remat=auto; return the config and the choice, or None if the config names a policy."""
    if config.model.remat != choices.AUTO:
        return config, None

    def settled(policy: str) -> ml_collections.ConfigDict:
        changed = config.copy_and_resolve_references()
        changed.model.remat = policy
        return changed

    def compile_with(policy: str) -> jax.stages.Compiled | choices.Refused:
        networks, observe, frozen = abstract_networks(settled(policy), mesh, condition)
        optimizer = make_optimizer(config.optimizer)
        method = make_method(config)
        state = state_shapes(networks, optimizer, mesh, method.averages, method.measured)
        batch = batch_shapes(config, mesh, condition)
        lowered = lower_train_step(networks, optimizer, config, observe, mesh, state, batch, frozen)
        return choices.compile_or_refused(lowered)

    with distributed.stage("choosing what to recompute in the backward pass"), interrupts.waits_for(COMPILER):
        chosen = choices.remat(compile_with, hardware.device_memory(mesh.local_devices[0], mesh))
    return settled(chosen.name), chosen


def lower_observe(observe: Observer, mesh: Mesh, frozen: dict[str, Any], batch: Batch) -> jax.stages.Lowered:
    """Lower a step's frozen networks by themselves."""
    placed = sharding.specs(mesh, frozen)
    # The null condition is the same everywhere; the rest has a row for each example.
    results: Any = (sharding.BATCH, sharding.WHOLE, sharding.BATCH)
    local = sharding.each_device(lambda *arguments: tuple(observe(*arguments)), mesh, (placed, sharding.BATCH), results)
    return jax.jit(local).lower(frozen, batch)


def abstract_networks(
    config: ml_collections.ConfigDict, mesh: Mesh, condition: Condition | None = None
) -> tuple[dict[str, Network], Observer, dict[str, Any]]:
    """Make the trained networks, and the frozen ones as a function, without reading a file.

    Args:
        condition: by default one that only has shapes.

    Returns:
        The trained networks by name; the observer; and the frozen arrays by name as ShapeDtypeStructs with shardings.
        `load_frozen` and `condition.load` read these; `run.adapted` reads "base", which config.lora freezes.
    """
    condition = condition or abstract_condition(config, mesh)
    whole = make_method(config)
    denoiser = network_lib.build(config.model.to_dict())
    networks = {"denoiser": lora.adapted(config, denoiser)} | whole.trained
    weights = {name: network.shapes for name, network in whole.frozen.items()}
    if adapter := lora.adapter_of(config):
        weights[lora.BASE] = adapter.base_shapes(denoiser.shapes)
    shapes = dict(condition.shapes) | sharding.placed_shapes(mesh, weights)

    return networks, make_observer(whole, condition), shapes


def make_observer(whole: Method, condition: Condition) -> Observer:
    """Make the part of a step that needs no gradient: (frozen, batch) → context, null condition, teachers' features.

    Given a method with only some of the losses, it only computes their features.
    """

    def observe(frozen: dict[str, Any], batch: Batch, method: Method | None = None) -> Observed:
        features = (method or whole).observe(frozen, batch["image"])
        return Observed(condition.context(frozen, batch), condition.null(frozen), features)

    return observe


def load_frozen(method: Method, mesh: Mesh) -> dict[str, Params]:
    """Read the weights of a method's frozen networks onto the mesh; raise UserError if a file is missing."""
    shapes = sharding.placed_shapes(mesh, {name: network.shapes for name, network in method.frozen.items()})
    return {
        name: jax.device_put(network.load(), jax.tree.map(lambda leaf: leaf.sharding, shapes[name]))
        for name, network in method.frozen.items()
    }
