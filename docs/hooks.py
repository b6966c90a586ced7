"""Hooks of MkDocs: pages that stand elsewhere in the repository, and an API page for each package."""

from __future__ import annotations

import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
# Programs and settings have pages of their own; the rest is of use from Python.
PACKAGES = ("method", "models", "sampling", "conditioning", "data", "evaluation", "convert", "run")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    pages = {page: _without_folder((ROOT / name).read_text()) for page, name in PAGES.items()}
    pages["api/index.md"] = "# API\n\n" + _modules(ROOT / "deco_jax", recursive=False)
    pages["api/index.md"] += "\n" + _modules(ROOT / "deco_jax" / "api", recursive=True)
    for name in PACKAGES:
        pages[f"api/{name}.md"] = f"# {name}\n\n" + _modules(ROOT / "deco_jax" / name, recursive=True)
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the API's pages in the navigation."""
    api = ["api/index.md", *({name: f"api/{name}.md"} for name in PACKAGES)]
    config.nav = [{"API": api} if "API" in entry else entry for entry in config.nav or []]
    if (ROOT / "docs" / "extending.md").is_file():
        config.nav.insert(2, {"Extending": "extending.md"})
    return config


def _modules(folder: pathlib.Path, recursive: bool) -> str:
    paths = sorted(folder.rglob("*.py") if recursive else folder.glob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return "\n\n".join(f"::: {name}" for name in names if name != "deco_jax.main") + "\n"


def _without_folder(markdown: str) -> str:
    """Turn links from the repository's root into links within docs/; other files of the root become plain text."""
    markdown = re.sub(r"\]\(docs/", "](", markdown).replace("](CONTRIBUTING.md)", "](contributing.md)")
    return re.sub(r"\[([^\]]*)\]\((?:LICENSE|CITATION\.cff|examples/)\)", r"\1", markdown)
