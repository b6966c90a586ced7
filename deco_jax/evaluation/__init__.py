"""Scores of models and samples: one file for each family of metrics, one interface (`evaluator.Evaluator`)."""

# Names in config.evaluate.metrics → their modules, which have `check(config)`, that all files are there, and
# `make(setup)`, the evaluator. By name, because the settings list them and the modules read settings.
EVALUATORS = {
    "adm": "deco_jax.evaluation.adm",  # FID, sFID, Inception Score, precision and recall
    "kid": "deco_jax.evaluation.kid",
    "fd_dinov2": "deco_jax.evaluation.fd_dinov2",
    "lpips": "deco_jax.evaluation.lpips",
    "clip_score": "deco_jax.evaluation.clip_score",
    "validation_loss": "deco_jax.evaluation.validation_loss",
}

# The scores' names in evaluation.json → in tables.
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
# Those of which less is better, and which a search over samplers can go by.
DISTANCES = ("fid", "sfid", "kid", "fd_dinov2")
