"""The documentation: its Python runs as it stands, its links lead somewhere, and every public name is in it."""

import ast
import importlib
import inspect
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vision3dgen import cli
from vision3dgen.datasets import prepare_procedural
from vision3dgen.io import save_mesh
from vision3dgen.ops import ico_sphere, torus

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
REFERENCE = runpy.run_path(str(ROOT / "docs" / "reference.py"))


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


# Whose blocks need files or runs; the tests named make these and run them.
ELSEWHERE = {
    "adversarial": "test_generation_runs.py", "backbones": "test_backbones.py", "extending": "test_extending.py",
    "latent": "test_generation_runs.py", "layers": "test_layers.py", "occupancy": "test_occupancy.py",
    "recognition": "test_classes.py",
}  # fmt: skip


@pytest.mark.slow
def test_the_readme_example_runs(tmp_path):
    (block,) = python_blocks(ROOT / "README.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 17
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "chair.glb").stat().st_size > 1000
    f1, ceiling, loss = (float(word) for word in done.stdout.split())
    assert 0 < f1 < ceiling <= 1
    assert loss > 0


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The folder that pages are run in: the configurations, data as docs/data.md makes it, some meshes."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "scans").mkdir()
    save_mesh(folder / "scans" / "ball.obj", ico_sphere(2))
    save_mesh(folder / "scans" / "ring.ply", torus(0.1, 0.4, 12, 24))
    categories = ["chair", "table"]
    prepare_procedural(folder / "data/p", shapes_per_category=5, categories=categories, views=2, points=4000, seed=0)
    return folder


HERE = [page for page in PAGES if python_blocks(page) and page.stem not in ELSEWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("page", HERE, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, workplace, monkeypatch):
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("vision3dgen.viz.scene._broken", "pages are tested with the built-in renderer")
    monkeypatch.chdir(workplace)
    scope = {"__name__": page.stem}
    for number, block in enumerate(python_blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), scope)


def commands(page: Path) -> list[list[str]]:
    """The words of every command of ours that a page types at a prompt."""
    blocks = re.findall(r"^```(.*)\n((?:(?!```).*\n)*)```", page.read_text(), re.MULTILINE)
    lines = "".join(block for language, block in blocks if language in ("", "sh"))
    lines = re.sub(r"\\\n\s*", " ", lines).splitlines()
    typed = [line for line in lines if line.startswith("vision3dgen ") and "..." not in line]
    return [shlex.split(line.split(" > ")[0].replace("$D", ""), comments=True) for line in typed]


@pytest.mark.slow
def test_the_first_ten_minutes_work(workplace, monkeypatch):
    """The page's commands one after another, with fewer steps; the scans are two meshes."""
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("vision3dgen.viz.scene._broken", "pages are tested with the built-in renderer")
    monkeypatch.chdir(workplace)
    page = ROOT / "docs" / "first-ten-minutes.md"
    for words in commands(page):
        fewer = [re.sub(r"^(trainer\.(?:steps|validation\.every))=\d+$", r"\1=2", word) for word in words[1:]]
        fewer += ["trainer.schedule.warmup=0"] if words[1] == "train" else []
        assert cli.main([word.replace("data/scans", "data/own") for word in fewer]) == 0, " ".join(words)
    assert (workplace / "runs/first/report.html").stat().st_size > 100_000
    assert (workplace / "runs/scans/view/shapes.png").stat().st_size > 1000


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_every_command_of_a_page_is_one(page):
    """What a page types at a prompt parses, and the configurations it names are there."""
    for words in commands(page):
        line = " ".join(words)
        options, rest = cli._parser().parse_known_args(words[1:])
        assert callable(options.run), line
        assert all("=" in word for word in rest), line
        for word in words:
            assert not word.startswith("configs/") or (ROOT / word).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_python_and_names_what_there_is(page):
    """Each block parses, and what it imports from the package exists, whether or not a test can run it whole."""
    for number, block in enumerate(python_blocks(page)):
        for node in ast.walk(ast.parse(block, f"{page.name}, block {number}")):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vision3dgen"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    known = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert known, f"{page.name}: {node.module} has no {alias.name}"


def test_pages_whose_python_is_run_elsewhere_are_run_there():
    for page, test in ELSEWHERE.items():
        assert (ROOT / "docs" / f"{page}.md").exists()
        text = (ROOT / "tests" / test).read_text()
        assert page in text or 'f"{page}.md"' in text, f"{test} does not run {page}.md"


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *PAGES]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_links_into_a_page_meet_a_heading():
    def anchors(path):
        heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        plain = (re.sub(r"[^\w\s-]", "", re.sub(r"[`*]|\]\(.*?\)", "", head)).strip().lower() for head in heads)
        return {re.sub(r"[\s-]+", "-", head) for head in plain}

    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text()):
            other = page.parent / target if target else page
            assert anchor in anchors(other), f"{page.name} links to {target}#{anchor}"


def test_every_page_is_in_the_site():
    def files(node):
        if isinstance(node, str):
            yield node
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from files(child)

    text = (ROOT / "mkdocs.yml").read_text()
    shown = list(files(yaml.safe_load(text)["nav"]))
    made = {f"api/{name}.md" for name in (*REFERENCE["PACKAGES"], *REFERENCE["MODULES"])}
    assert sorted(shown) == sorted({page.name for page in PAGES} | made)


def test_every_test_file_named_in_the_coverage_table_exists():
    text = (ROOT / "docs" / "coverage.md").read_text()
    named = set(re.findall(r"test_\w+\.py", text))
    assert named
    missing = sorted(name for name in named if not (ROOT / "tests" / name).exists())
    assert not missing


# ---------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("package", REFERENCE["PACKAGES"])
def test_each_public_name_is_documented(package):
    """In the reference by its own docstring; a NamedTuple's generated one does not count."""
    module = importlib.import_module(f"vision3dgen.{package}")
    names = REFERENCE["public_names"](package)
    assert names
    page = REFERENCE["page_of"](package)
    for name in names:
        assert f"::: vision3dgen.{package}.{name}\n" in page
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            text = (value.__doc__ or "").strip()
            assert text, f"vision3dgen.{package}.{name} has no docstring"
            assert not text.startswith(f"{name}("), f"vision3dgen.{package}.{name} has no docstring of its own"


def test_the_reference_leaves_no_package_and_no_module_out():
    own = {"cli", "completion", "language"}  # what a user calls by other names
    folder = ROOT / "vision3dgen"
    there = {path.stem for path in folder.glob("*.py") if path.stem != "__init__"}
    there |= {path.parent.name for path in folder.glob("*/__init__.py")}
    known = {name.partition(".")[0] for name in (*REFERENCE["PACKAGES"], *REFERENCE["MODULES"])}
    assert there - own == known


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mkdocs") is None, reason='mkdocs is not installed: pip install "vision3dgen[docs]"')
def test_the_site_builds_without_warnings(tmp_path):
    done = subprocess.run(
        ["mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "chamfer_distance" in (tmp_path / "api" / "losses" / "index.html").read_text()
