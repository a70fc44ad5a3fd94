"""The registry: names and strings only; what it names is there and loads no framework."""

import ast
import dataclasses
import importlib.util
import subprocess
import sys

import pytest

from blacksmith import config as configuration
from blacksmith import registry
from blacksmith.errors import ConfigError

TOY = registry.Experiment(
    name="toy",
    summary="a toy",
    configs="toy.configs",
    entry="toy.train:main",
    backends={"jax": registry.Needs("jax", ("jax",))},
    checkpoint_format="toy-1",
)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Undoes what a test adds."""
    monkeypatch.setattr(registry, "_EXPERIMENTS", dict(registry._EXPERIMENTS))


@pytest.fixture(params=registry.names())
def experiment(request):
    """Each registered experiment."""
    return registry.get(request.param)


def test_an_added_experiment_is_found_and_listed_in_order():
    before = registry.names()
    registry.add(TOY)
    registry.add(dataclasses.replace(TOY, name="a toy"))
    assert registry.get("toy") is TOY
    assert registry.names() == sorted([*before, "toy", "a toy"])


def test_adding_the_same_experiment_again_changes_nothing():
    registry.add(TOY)
    registry.add(dataclasses.replace(TOY))
    assert registry.names().count("toy") == 1


def test_another_experiment_under_a_taken_name_is_refused_and_the_first_one_stays():
    registry.add(TOY)
    with pytest.raises(ConfigError, match="two experiments are called 'toy'; rename yours"):
        registry.add(dataclasses.replace(TOY, entry="other:main"))
    assert registry.get("toy") is TOY


def test_a_shipped_experiment_cannot_be_replaced():
    with pytest.raises(ConfigError, match="keras/mnist"):
        registry.add(dataclasses.replace(TOY, name="keras/mnist"))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("keras/mnits", " (did you mean 'keras/mnist'?)"),
        ("Keras/MNIST", " (did you mean 'keras/mnist'?)"),
        ("lightening/mnist", " (did you mean 'lightning/mnist'?)"),
        ("zzz", ""),
        ("", ""),
        (None, ""),
        (3, ""),
        ([], ""),
    ],
)
def test_an_unknown_name_lists_those_there_are_and_the_closest(name, near):
    with pytest.raises(ConfigError) as caught:
        registry.get(name, where="a.gin:1: Run.experiment")
    expected = (
        f"a.gin:1: Run.experiment: no experiment {name!r}{near}; allowed: {', '.join(registry.names())}"
    )
    assert str(caught.value) == expected


def test_an_experiment_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TOY.name = "other"


def test_every_entry_names_modules_that_exist(experiment):
    module, _, function = experiment.entry.partition(":")
    assert importlib.util.find_spec(experiment.configs) is not None
    # Read, not imported: importing an entry loads its framework.
    source = importlib.util.find_spec(module).loader.get_source(module)
    assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def test_every_configuration_has_the_sections_that_the_launcher_reads(experiment):
    sections = configuration.sections(importlib.import_module(experiment.configs).Config)
    assert {"run", "checkpoint", "log"} <= set(sections)
    names = [cls.gin_name for cls in sections.values()]
    assert len(set(names)) == len(names)


def test_every_section_and_field_is_described(experiment):
    for cls in configuration.sections(importlib.import_module(experiment.configs).Config).values():
        assert cls.__doc__
        for name, field in configuration.fields(cls).items():
            assert field.description, f"{cls.gin_name}.{name}"
            assert "\n" not in field.description
            assert isinstance(configuration.may_change(cls, name), bool)


def test_every_backend_is_one_that_run_backend_allows(experiment):
    sections = configuration.sections(importlib.import_module(experiment.configs).Config)
    assert experiment.backends
    for backend in experiment.backends:
        assert sections["run"](experiment=experiment.name, backend=backend).backend == backend


def test_the_registry_and_all_configurations_load_no_framework_and_no_data(tmp_path):
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
