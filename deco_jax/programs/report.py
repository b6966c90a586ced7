"""--mode=report: writes one HTML file about a run, or about several side by side, that opens without a network."""

from __future__ import annotations

import ml_collections

from deco_jax.errors import UserError
from deco_jax.report.history import read_run
from deco_jax.report.page import page
from deco_jax.run import storage
from deco_jax.run.workdir import listed, make_folder, short_names
from deco_jax.run.writer import write_atomically


def report(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Write WORKDIR/report.html about that workdir, or about those of config.report.workdirs."""
    settings, folder = config.report, storage.path(workdir)
    folders = listed(settings.workdirs) or [folder]
    if len({storage.absolute(path) for path in folders}) < len(folders):
        raise UserError(f"config.report.workdirs={settings.workdirs} names a workdir twice; give each only once")
    runs = [
        read_run(path, name, settings.grids, settings.grid_pixels)
        for path, name in zip(folders, short_names(folders), strict=True)
    ]
    make_folder(folder)
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    where = folder / "report.html"
    text = page(runs).encode()
    write_atomically(where, text)
    print(f"wrote {where} ({len(text) / 2**20:.1f} MiB) about {len(runs)} run{'s' if len(runs) > 1 else ''}")
