"""The Python API: a model with its weights, ready to draw. The modes that draw use the same object.

import deco_jax

model = deco_jax.load("runs/quickstart")
images = model.sample(classes=[3, 3, 7], num_steps=40, seed=0)
for snapshot in model.stream(classes=[1], num_steps=30):
    print(snapshot.step, snapshot.images.shape)
"""

from deco_jax.api.inputs import Settings, Snapshot
from deco_jax.api.loading import CLASSES, MEASURED, class_names, load, open_model
from deco_jax.api.model import Model

__all__ = ["CLASSES", "MEASURED", "Model", "Settings", "Snapshot", "class_names", "load", "open_model"]
