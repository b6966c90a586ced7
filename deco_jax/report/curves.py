"""A logged value of several runs over the steps, in one picture."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping

from deco_jax.report import style
from deco_jax.run import files
from deco_jax.run.metrics import read_rows


def plot(folders: Mapping[str, pathlib.Path], workdir: pathlib.Path, key: str) -> None:
    """Draw a value that runs have logged over the steps, one line a run that has it, into WORKDIR/KEY.png.

    Args:
        folders: of the runs, by the names that they get in the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = {name: read_rows(folder / "metrics.jsonl")[0] for name, folder in folders.items()}
    lines = {name: [(row["step"], row[key]) for row in logged if key in row] for name, logged in rows.items()}
    drawn = {name: points for name, points in lines.items() if points}
    for i, (points, label) in enumerate(zip(drawn.values(), style.in_words(list(drawn)), strict=True)):
        axes.plot(*zip(*points, strict=True), **style.curve(i, markers=True), label=label)
    if not any(lines.values()):
        print(f"no run has logged {key!r}; nothing to plot", file=sys.stderr)
        return
    axes.set(xlabel="step", ylabel=key)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with files.whole(workdir / f"{key}.png") as part:
        figure.savefig(part, dpi=150, format="png")
    missing = [name for name in lines if name not in drawn]
    print(f"wrote {workdir / f'{key}.png'}" + (f"; without {', '.join(missing)}, which logged none" if missing else ""))
