"""AdamW as the paper uses it, with optional clipping and warm-up."""

from __future__ import annotations

import ml_collections
import optax


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """The optax chain of config.optimizer: clip by global norm (0: off), then AdamW at a constant rate after warm-up.

    Decay, if any, is on every parameter, as torch.optim.AdamW does by default.
    """
    rate = optax.constant_schedule(config.learning_rate)
    if config.warmup_steps:
        # Step 1 already moves: (i + 1) / warmup.
        rate = optax.linear_schedule(
            config.learning_rate / config.warmup_steps, config.learning_rate, max(1, config.warmup_steps - 1)
        )
    # The state's structure is the same for all settings, so that a run can be resumed with others.
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)
    return optax.chain(clip, adamw)
