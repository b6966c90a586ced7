"""FID and its companions as the ADM suite defines them, and frequency spectra."""

# The scores' names in evaluation.json and in tables.
TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
}
