"""Makes the pages of the API reference for mkdocs: one per package, from the names that its `__init__` re-exports."""

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODULES = (
    "config",
    "experiment",
    "samples",
    "report",
    "pretrained",
    "convert",
    "doctor",
    "sweep",
    "checks",
    "files",
    "parallel",
    "cluster",
)
PACKAGES = (
    "structures", "io", "ops", "losses", "layers", "backbones", "heads", "models", "generators", "datasets", "metrics",
    "engine", "viz", "viz.report",
)  # fmt: skip


def public_names(package: str) -> list[str]:
    """What `vision3dgen.PACKAGE` offers: names imported as themselves, and tables written in capitals."""
    path = ROOT / "vision3dgen" / package.replace(".", "/") / "__init__.py"
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            names += [alias.asname for alias in node.names if alias.asname == alias.name]
        elif isinstance(node, ast.AnnAssign | ast.FunctionDef | ast.ClassDef):
            name = node.target.id if isinstance(node, ast.AnnAssign) else node.name  # type: ignore[union-attr]
            names += [name] if not name.startswith("_") else []
    return [name for name in names if name is not None]


def page_of(name: str) -> str:
    """Markdown that mkdocstrings turns into the reference of a package or module."""
    title = f"# vision3dgen.{name}\n\n"
    if name in MODULES:
        return f"{title}::: vision3dgen.{name}\n"
    blocks = [f"::: vision3dgen.{name}.{each}\n" for each in public_names(name)]
    return title + "\n".join(blocks)


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: adds the pages to those of the folder."""
    from mkdocs.structure.files import File

    for name in (*PACKAGES, *MODULES):
        files.append(File.generated(config, f"api/{name}.md", content=page_of(name)))
    return files
