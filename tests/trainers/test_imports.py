"""Who may import whom: the rooms of the house, checked in the source; no framework is loaded here."""

import ast
from pathlib import Path

import pytest

import blacksmith

ROOT = Path(blacksmith.__file__).parent
FRAMEWORKS = {"jax", "keras", "lightning", "tensorflow", "torch"}

# From the top: a room imports only from rooms above it.
HOUSE = (
    "errors",
    "config",
    "shared_configs",
    "registry",
    "order",
    "metrics",
    "checkpoint",
    "report",  # reads run directories, not `run`, which has it write the page at the end of a run
    "run",
    "assets",
    "devices",
    "datasets",
    "models",
    "trainers",
    "experiments",
    "launch",
    "parity",
)


def modules():
    """Every module by dotted name below the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = path
    return found


def imports(path):
    """What a module imports, anywhere in it, as dotted names; relative ones are not used."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_of(path):
    """The rooms of the package that a module imports from."""
    names = (name.split(".") for name in imports(path))
    return {parts[1] for parts in names if parts[0] == "blacksmith" and len(parts) > 1} & set(HOUSE)


def test_every_module_belongs_to_a_room():
    assert {name.split(".")[0] for name in modules()} - {""} == set(HOUSE)


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_a_room_imports_only_from_rooms_above_it(name):
    room = name.split(".")[0]
    allowed = set(HOUSE[: HOUSE.index(room) + 1])
    assert rooms_of(modules()[name]) <= allowed


@pytest.mark.parametrize("room", ["datasets", "models", "trainers"])
def test_nothing_above_the_experiments_imports_one(room):
    named = [name for name in modules() if name.split(".")[0] == room]
    assert named
    for name in named:
        assert "experiments" not in rooms_of(modules()[name])
        assert "blacksmith.experiments" not in modules()[name].read_text(encoding="utf-8")


def test_the_trainers_do_not_know_mnist():
    for name, path in modules().items():
        if name.split(".")[0] == "trainers":
            text = path.read_text(encoding="utf-8").lower()
            assert "mnist" not in text, name
            assert "blacksmith.datasets" not in text, name
            assert "blacksmith.models" not in text, name


def test_datasets_load_no_framework():
    for name, path in modules().items():
        if name.split(".")[0] in ("datasets", "order", "metrics", "checkpoint", "run", "report", "config"):
            assert not {i.split(".")[0] for i in imports(path)} & FRAMEWORKS, name


def test_each_backend_s_file_alone_imports_its_framework_on_loading():
    for name, path in modules().items():
        if name.split(".")[0] != "trainers":
            continue
        body = ast.parse(path.read_text(encoding="utf-8")).body
        loaded = {
            alias.split(".")[0]
            for node in body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        allowed = {"trainers.jax_backend": {"jax"}, "trainers.torch_backend": {"torch"}}.get(name, set())
        assert loaded & (FRAMEWORKS - {"keras"}) == allowed, name
