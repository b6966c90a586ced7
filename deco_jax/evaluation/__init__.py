"""Scores of models and samples: one file for each family of metrics, one interface (`evaluator.Evaluator`).

adm                FID, sFID, Inception Score, precision and recall, as the ADM suite defines them
spectrum           energy over frequency
"""

# The scores' names in evaluation.json and in tables.
TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
}
