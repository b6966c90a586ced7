"""Pieces of HTML that the sections of a report are made of."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from deco_jax.report.history import Picture, Run


def text(value: Any) -> str:
    """Escape for content and for attributes in double quotes."""
    return html.escape(str(value), quote=True)


def swatch(run: int) -> str:
    return f'<span class="swatch" style="--colour: var(--c{run % 8})"></span>'


def button(i: int, run: Run) -> str:
    return f'<button type="button" data-run="{i}" aria-pressed="true">{swatch(i)}{text(run.name)}</button>'


def image(picture: Picture | None, alternative: str, attributes: str = "", hidden: bool = False) -> str:
    assert picture is not None
    width, height = picture.size
    kind = ' class="pixels"' if picture.pixels else ""
    return (
        f'<img src="{picture.uri}" alt="{text(alternative)}" width="{width}" height="{height}"{kind}{attributes}'
        f"{' hidden' if hidden else ''}>"
    )


def missing(run: Run, what: str, runs: list[Run]) -> str:
    return f'<p class="missing">{text(f"{run.name}: {what}" if len(runs) > 1 else what[0].upper() + what[1:])}.</p>'


def note_list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""


def table(
    names: Iterable[str], rows: list[tuple[str, list[tuple[Any, str]]]], kind: str = "", marked: Iterable[str] = ()
) -> str:
    """Lay out a row for each title and a column for each name.

    Args:
        rows: (title, cells); a cell is (value, what to say where the value is None).
        kind: the table's class in the style sheet.
        marked: titles whose rows are highlighted.
    """
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
    body = ""
    for title, cells in rows:
        columns = "".join(
            f'<td class="missing">{text(why)}</td>' if value is None else f"<td>{text(value)}</td>"
            for value, why in cells
        )
        body += f'<tr{" class=differs" if title in marked else ""}><th scope="row">{text(title)}</th>{columns}</tr>'
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
