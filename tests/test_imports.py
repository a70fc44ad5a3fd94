"""Who may import whom, checked in the source of every module; no framework is loaded here."""

import ast
import graphlib
from pathlib import Path

import pytest

import blacksmith

ROOT = Path(blacksmith.__file__).parent
FRAMEWORKS = {"jax", "keras", "lightning", "tensorflow", "torch"}

# From the ground up: a room imports only from itself and from rooms above it in this list.
HOUSE = (
    "console",
    "errors",
    "files",
    "network",
    "config",
    "run",
    "registry",
    "assets",
    "devices",
    "datasets",
    "models",
    "trainers",
    "report",
    "experiments",
    "launch",
    "parity",
)
# Rooms whose modules import no framework, not even inside a function.
FRAMEWORK_FREE = {
    "console",
    "errors",
    "files",
    "network",
    "config",
    "registry",
    "report",
    "run",
    "assets",
    "datasets",
    "launch",
}


def _imported(path):
    """What a module imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in FILES else node.module


def _module_name(path):
    parts = ("blacksmith", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


FILES = {_module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
MODULES = {name: set(_imported(path)) for name, path in FILES.items()}


def _room(name):
    return name.split(".")[1]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "blacksmith"])
def test_a_module_imports_only_from_rooms_above(name):
    allowed = HOUSE[: HOUSE.index(_room(name)) + 1]
    rooms = {_room(i) for i in MODULES[name] if i.startswith("blacksmith.")}
    assert rooms <= set(allowed)


def test_no_two_modules_import_each_other():
    edges = {name: (imports & MODULES.keys()) - {name, "blacksmith"} for name, imports in MODULES.items()}
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which names the circle


def test_frameworks_are_imported_where_they_belong():
    for name, imports in MODULES.items():
        if name != "blacksmith" and _room(name) in FRAMEWORK_FREE:
            assert not {i.split(".")[0] for i in imports} & FRAMEWORKS, name


def test_each_backend_alone_imports_its_framework():
    own = {"jax_backend": {"jax"}, "native_optimizers": {"torch"}, "lightning": {"lightning", "torch"}}
    own |= {f"torch_{part}": {"torch"} for part in ("backend", "graph", "optimizer", "state")}
    for name in (name for name in MODULES if name.startswith("blacksmith.trainers.")):
        body = ast.parse(FILES[name].read_text()).body
        top_level = [node for node in body if isinstance(node, ast.Import)]
        loaded = {alias.name.split(".")[0] for node in top_level for alias in node.names}
        assert loaded & (FRAMEWORKS - {"keras"}) <= own.get(name.rpartition(".")[2], set()), name


def test_no_experiment_imports_another_one():
    def package(name):
        return name.split(".")[2:4]  # framework and task

    for name in MODULES:
        others = {i for i in MODULES[name] if i.startswith("blacksmith.experiments.")}
        assert all(package(i) == package(name) for i in others), name
