"""Scores of models and samples: one file per family of metrics, one interface (`evaluator.Evaluator`)."""

from __future__ import annotations

from collections.abc import Iterable

# Names in config.evaluate.metrics → modules with `check(config)`, which makes sure that all files exist, and
# `make(setup)`, which makes the evaluator. Modules are given by name because they read the settings that list them.
EVALUATORS = {
    "adm": "deco_jax.evaluation.adm",  # FID, sFID, Inception Score, precision and recall
    "kid": "deco_jax.evaluation.kid",
    "fd_dinov2": "deco_jax.evaluation.fd_dinov2",
    "lpips": "deco_jax.evaluation.lpips",
    "clip_score": "deco_jax.evaluation.clip_score",
    "validation_loss": "deco_jax.evaluation.validation_loss",
}

# The scores' names in evaluation.json → their names in tables.
ADM_TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
}
TITLES = {
    **ADM_TITLES,
    "kid": "KID",
    "fd_dinov2": "FD-DINOv2",
    "lpips_reconstruction": "LPIPS of denoised",
    "lpips_pairs": "LPIPS of pairs",
    "clip_score": "CLIP score",
}
# Scores of which lower is better; a search over samplers can use them.
DISTANCES = ("fid", "sfid", "kid", "fd_dinov2")


def titles_of(names: Iterable[str]) -> dict[str, str]:
    """Return the scores' names in tables, in the order of TITLES; the validation losses come last."""
    names = list(names)
    losses = sorted(name for name in names if name.startswith("validation"))
    known = {name: title for name, title in TITLES.items() if name in names}
    return known | {name: name.replace("_", " ") for name in losses}
