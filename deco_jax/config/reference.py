"""Lists every setting with its meaning, for --help and docs/settings.md.

python -m deco_jax.config.reference > docs/settings.md
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from deco_jax.config.sections import MODEL, SECTION_CLASSES, SECTIONS, TOP
from deco_jax.schema import Setting

HEADER = """\
# Settings

Every setting, its default and what it means. Give one on the command line as `--config.SECTION.NAME=VALUE`, for example
`--config.data.batch_size=64`. The files in `configs/` change some of the defaults; `--help` prints this list as well.

This page is written by `python -m deco_jax.config.reference > docs/settings.md`.
"""


class Section(NamedTuple):
    """A section of the settings; its name is "" for those of the whole run."""

    name: str
    about: str
    settings: dict[str, Setting]
    only: dict[str, list[str]]  # for a setting that not every model has: the models that have it


def sections() -> Iterator[Section]:
    """Yield all sections in the order in which they are shown."""
    yield Section("", "The whole run.", TOP, {})
    merged: dict[str, Setting] = {}
    for settings in MODEL.values():
        merged |= {name: setting for name, setting in settings.items() if name not in merged}
    having = {name: [model for model in MODEL if name in MODEL[model]] for name in merged}
    only = {name: models for name, models in having.items() if len(models) < len(MODEL)}
    yield Section("model", "The network. Its settings depend on config.model.name.", merged, only)
    for name, settings in SECTIONS.items():
        yield Section(name, (SECTION_CLASSES[name].__doc__ or "").strip(), settings, {})


def text(width: int = 100) -> str:
    """Return the settings as lines for a terminal."""
    lines = []
    for section in sections():
        lines += ["", f"{f'config.{section.name}' if section.name else 'config'}: {section.about}"]
        for name, setting in section.settings.items():
            dotted = f"{section.name}.{name}" if section.name else name
            lines.append(f"  --config.{dotted}={_shown(setting.default)}")
            lines += textwrap.wrap(
                _explained(setting, section.only.get(name)), width, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines[1:])


def page() -> str:
    """Return the settings as a Markdown page."""
    parts = [HEADER]
    for section in sections():
        parts += [f"\n## {f'config.{section.name}' if section.name else 'config'}\n", f"{section.about}\n"]
        parts += ["| setting | default | meaning |", "|---|---|---|"]
        for name, setting in section.settings.items():
            meaning = _explained(setting, section.only.get(name)).replace("|", "\\|")
            parts.append(f"| `{name}` | `{_shown(setting.default)}` | {meaning} |")
    return "\n".join(parts) + "\n"


def _shown(value: object) -> str:
    return '""' if value == "" else str(value)


def _explained(setting: Setting, only: list[str] | None) -> str:
    words = setting.help
    if setting.rule.words:
        words += f" {setting.rule.words[0].upper()}{setting.rule.words[1:]}."
    if only:
        words += f" Only for {', '.join(only)}."
    return words


if __name__ == "__main__":
    print(page(), end="")
