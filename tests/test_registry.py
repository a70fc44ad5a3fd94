"""The registry: what it names exists, and it loads no framework."""

import ast
import dataclasses
import functools
import importlib.util
import subprocess
import sys

import pytest

from blacksmith import config as configuration
from blacksmith import registry
from blacksmith.errors import ConfigError

READ = registry._experiments  # replaced by a copy while a test runs
TOY = registry.Experiment(
    name="toy",
    summary="a toy",
    configs="toy.configs",
    modes={"train": "toy.train:main"},
    backends={"jax": registry.Needs("jax", ("jax",))},
    checkpoint_format="toy-1",
)


pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.fixture(params=registry.names())
def experiment(request):
    """Each registered experiment."""
    return registry.get(request.param)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution whose entry points are in `toys.py`."""

    def put(*entries):
        (tmp_path / "toys.py").write_text(
            "from blacksmith.registry import Experiment, Needs\n"
            "TOY = Experiment('toy', 'installed', 'toys', {}, {'jax': Needs('jax', ())}, '1')\n"
            "MNIST = Experiment('keras/mnist', 'mine', 'toys', {}, {}, '1')\n"
        )
        info = tmp_path / "toys-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[blacksmith.experiments]\n" + "\n".join(entries))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "toys", raising=False)
        monkeypatch.setattr(registry, "_experiments", functools.cache(READ.__wrapped__))

    return put


def test_the_bundled_experiments_are_found():
    assert registry.names() == ["keras/mnist", "lightning/mnist", "lightning/nerf", "pytorch/llama"]


def test_an_added_experiment_is_listed_in_order():
    before = registry.names()
    registry.add(TOY)
    registry.add(dataclasses.replace(TOY, name="a toy"))
    assert registry.get("toy") is TOY
    assert registry.names() == sorted([*before, "toy", "a toy"])


def test_adding_the_same_experiment_again_changes_nothing():
    registry.add(TOY)
    registry.add(dataclasses.replace(TOY))
    assert registry.names().count("toy") == 1


def test_a_taken_name_is_refused():
    registry.add(TOY)
    with pytest.raises(ConfigError, match=r"two experiments are called 'toy'.*rename yours"):
        registry.add(dataclasses.replace(TOY, configs="other"))
    assert registry.get("toy") is TOY
    with pytest.raises(ConfigError, match="two experiments are called 'keras/mnist'"):
        registry.add(dataclasses.replace(TOY, name="keras/mnist"))


def test_an_entry_point_is_an_experiment(install):
    install("anything = toys:TOY")
    assert registry.get("toy").summary == "installed"
    with pytest.raises(ConfigError, match="two experiments are called 'toy'"):
        registry.add(TOY)


def test_an_entry_point_cannot_take_a_bundled_name(install, capsys):
    install("anything = toys:MNIST", "other = toys:TOY")
    assert registry.get("keras/mnist").summary != "installed"
    assert "toy" in registry.names()
    assert "two experiments are called 'keras/mnist'" in capsys.readouterr().err


def test_a_broken_entry_point_is_skipped_with_a_warning(install, capsys):
    install("bad = toys:NOPE", "good = toys:TOY")
    assert "toy" in registry.names()
    assert "warning: entry point bad = toys:NOPE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("keras/mnits", " (did you mean 'keras/mnist'?)"),
        ("Keras/MNIST", " (did you mean 'keras/mnist'?)"),
        ("zzz", ""),
        ("", ""),
        (None, ""),
        ([], ""),
    ],
)
def test_an_unknown_name_suggests_the_closest(name, near):
    with pytest.raises(ConfigError) as caught:
        registry.get(name, where="a.gin:1: Run.experiment")
    allowed = ", ".join(registry.names())
    assert str(caught.value).startswith(
        f"a.gin:1: Run.experiment: no experiment {name!r}{near}; allowed: {allowed}"
    )
    assert str(caught.value).endswith("and your own with --plugin=MODULE")


def test_every_mode_names_a_function_that_exists(experiment):
    assert {"train", "eval", "export"} <= experiment.modes.keys()
    assert importlib.util.find_spec(experiment.configs) is not None
    for entry in experiment.modes.values():
        module, _, function = entry.partition(":")
        # Read, not imported: importing it loads its framework.
        source = importlib.util.find_spec(module).loader.get_source(module)
        assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def test_every_configuration_has_the_required_sections(experiment):
    sections = configuration.sections(importlib.import_module(experiment.configs).Config)
    assert {"run", "train", "checkpoint", "log"} <= set(sections)
    names = [cls.gin_name for cls in sections.values()]
    assert len(set(names)) == len(names)


def test_every_section_and_field_is_described(experiment):
    for cls in configuration.sections(importlib.import_module(experiment.configs).Config).values():
        assert cls.__doc__
        for name, field in configuration.fields(cls).items():
            assert field.description, f"{cls.gin_name}.{name}"
            assert "\n" not in field.description


def test_every_backend_is_allowed_by_run_backend(experiment):
    sections = configuration.sections(importlib.import_module(experiment.configs).Config)
    assert experiment.backends
    for backend in experiment.backends:
        assert sections["run"](experiment=experiment.name, backend=backend).backend == backend


def test_names_and_configurations_load_no_framework(tmp_path):
    code = (
        "import importlib, sys; from blacksmith import registry; "
        "[importlib.import_module(registry.get(name).configs) for name in registry.names()]; "
        "print(sorted({'jax', 'jaxlib', 'torch', 'keras', 'lightning', 'tensorboard', 'plotly', 'numpy'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
