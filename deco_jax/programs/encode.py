"""--mode=encode: computes the features of all captions of config.data into config.text.features, for training to read.

Finished files stay, so an interrupted run continues; `data/features.py` describes their layout.
"""

from __future__ import annotations

import os

import jax
import ml_collections
import numpy as np

from deco_jax.conditioning import encoders
from deco_jax.conditioning import texts as texts_lib
from deco_jax.data import features as features_lib
from deco_jax.data import sources
from deco_jax.errors import UserError
from deco_jax.run import distributed, sharding, storage
from deco_jax.run.progress import Progress
from deco_jax.run.workdir import make_workdir

SECONDS_BETWEEN_LINES = 10.0


def encode(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Fill config.text.features.

    Raises:
        UserError: the model takes no text, no folder is given, it holds other features, or the encoder is missing.
    """
    del workdir  # the features don't belong to a run
    settings = config.text
    if not config.model.text_width:
        raise UserError("--mode=encode is for text-to-image models, but config.model.text_width is 0; nothing to do")
    if not settings.features:
        beside = f"{config.data.path.rstrip('/')}.features" if config.data.path else "FOLDER"
        raise UserError(f"--mode=encode needs a folder to fill; set --config.text.features={beside}")
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, slices=config.mesh.slices)
    sharding.check_batch(mesh, config.data.batch_size, "config.data.batch_size")
    source = sources.open_source(config.data)
    distributed.check_same_data(source)
    sources.check_classes(source, config.model.num_classes)
    encoder = encoders.open_encoder(config)
    key = texts_lib.features_key(config, source)
    folder = storage.path(os.path.expanduser(settings.features))
    if (folder / "store.json").exists():
        features_lib.Features(folder, key).check_some(source)
    texts = texts_lib.Texts(config, mesh, source, encoder, None)
    weights = texts.load_encoder()
    make_workdir(folder)
    distributed.on_main_host(lambda: features_lib.create(folder, key))
    store = features_lib.Features(folder, key)

    main_host = jax.process_index() == 0
    # The first host decides what is left: others may see new files later, and all hosts encode together.
    left = [shard for shard in range(store.num_shards) if not distributed.from_main_host(store.has(shard))]
    total, done = store.count, store.count - sum(len(store.indices(shard)) for shard in left)
    if main_host:
        print(f"{total:,} captions, {done:,} of them done; compiling ...", flush=True)
    size = config.data.batch_size
    null = texts.encode(weights, [""] * size)[0]
    if main_host:
        store.write_null(null.view(np.uint16))
    progress = Progress(total, done, "captions encoded", every=SECONDS_BETWEEN_LINES)
    for shard in left:
        indices, parts, hashes = store.indices(shard), [], []
        for start in range(0, len(indices), size):
            captions = [features_lib.caption_of_number(source, i) for i in indices[start : start + size]]
            # Padded, so that one compilation serves all batches.
            filled = [encoders.prefixed(caption, settings.prefix) for caption in captions] + [""] * (
                size - len(captions)
            )
            parts.append(texts.encode(weights, filled)[: len(captions)])
            hashes += [features_lib.caption_hash(caption) for caption in captions]
            done += len(captions)
            progress(done)
        if main_host:
            store.write(shard, np.concatenate(parts).view(np.uint16), np.asarray(hashes))
    if main_host:
        print(f"wrote {folder}; train with --config.text.features={settings.features}")
