"""Strict Gin configuration: reading, validating, freezing, saving and comparing."""

import contextlib
import dataclasses
import sys
from typing import Literal

import pytest

from blacksmith import config as configuration
from blacksmith import launch
from blacksmith.config.sections import section, setting
from blacksmith.errors import ConfigError


@section("toy.Data")
class Data:
    """Where the toys come from."""

    path: str | None = setting(None, "a directory")
    count: int = setting(3, "how many toys", ge=1, le=100)
    validation: int | Literal["test"] = setting(0, "toys held out")
    kind: Literal["train", "doll", "ball"] = setting("ball", "the kind of toy")


@section("toy.Train")
class Train:
    """How the toys are played with."""

    epochs: int = setting(1, "games", gt=0, resume_may_change=True)
    rate: float = setting(0.5, "speed of play", gt=0, lt=10)
    shuffle: bool = setting(True, "whether toys are mixed")
    hidden: tuple[int, ...] = setting((4, 4), "widths")
    scales: tuple[float, float] = setting((0.5, 2.0), "smallest and largest size")


@dataclasses.dataclass(frozen=True)
class Config:
    """Two sections and one rule."""

    data: Data
    train: Train

    def check(self):
        """Raises ConfigError for more games than toys."""
        if self.train.epochs > self.data.count:
            raise ConfigError(
                f"toy.Train.epochs = {self.train.epochs} is more than toy.Data.count = {self.data.count}"
            )


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file below an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)

    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write_file


def parsed(*files, params=(), allow_imports=False):
    """The values that files and parameters decide on, by ``selector.field``."""
    bindings = configuration.parse(files, params, allow_imports=allow_imports)
    decided = {(b.selector, b.field) for b in bindings if b.field}
    return {f"{s}.{f}": configuration.bound(bindings, s, f).value for s, f in decided}


def built(*params):
    """A `Config` of single bindings."""
    return configuration.build(Config, configuration.parse([], params), experiment="toy")


@contextlib.contextmanager
def fails(*words):
    """Expects a one-line `ConfigError` that contains all of `words`."""
    with pytest.raises(ConfigError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# Parsing


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("1e-3", 1e-3),
        ("1_000", 1000),
        ("True", True),
        ("None", None),
        ("'a'", "a"),
        ('"a" "b"', "ab"),
        (r"r'C:\new'", r"C:\new"),
        ("'# no comment'", "# no comment"),
        ("(1, 2)", (1, 2)),
        ("(1,)", (1,)),
        ("(1)", 1),
        ("()", ()),
        ("[1, 'b']", [1, "b"]),
        ("{'a': 1}", {"a": 1}),
        ("(1,\n  2,  # two\n)", (1, 2)),
    ],
)
def test_a_plain_value_is_read_as_python_reads_it(write, text, value):
    write("a.gin", f"toy.Data.x = {text}  # a comment\n")
    assert parsed("a.gin") == {"toy.Data.x": value}


def test_a_block_sets_several_fields_of_one_section(write):
    write("a.gin", "toy.Train:\n  # games\n  epochs = 3\n\n  rate = 0.1\ntoy.Data.count = 5\n")
    assert parsed("a.gin") == {"toy.Train.epochs": 3, "toy.Train.rate": 0.1, "toy.Data.count": 5}


def test_a_file_may_start_with_a_byte_order_mark_and_have_windows_line_ends(write, tmp_path):
    (tmp_path / "a.gin").write_bytes(b"\xef\xbb\xbftoy.Data.count = 5\r\ntoy.Train.epochs = 2\r\n")
    assert parsed("a.gin") == {"toy.Data.count": 5, "toy.Train.epochs": 2}


def test_each_binding_knows_its_file_and_line(write):
    write("a.gin", "# one\ntoy.Data.count = 5\ntoy.Train:\n  epochs = 3\n")
    bindings = configuration.parse(["a.gin"], ["toy.Data.count = 6"])
    assert [b.where for b in bindings] == ["a.gin:2", "a.gin:4", "--gin_param 'toy.Data.count = 6'"]


def test_an_include_is_found_beside_the_including_file(write):
    write("deep/base.gin", "toy.Data.count = 5\n")
    write("deep/a.gin", "include 'base.gin'\n")
    write("base.gin", "toy.Data.count = 6\n")
    assert parsed("deep/a.gin") == {"toy.Data.count": 5}


def test_an_include_may_climb_and_is_named_as_the_flag_would_name_it(write):
    write("common/base.gin", "toy.Data.cuont = 5\n")
    write("mine/a.gin", "include '../common/base.gin'\n")
    (binding,) = configuration.parse(["mine/a.gin"])
    assert binding.where == "common/base.gin:1"


@pytest.mark.parametrize("name", ["include/mnist.gin", "gin/include/mnist.gin"])
def test_an_include_is_found_among_the_shipped_files(write, name):
    write("a.gin", f"include '{name}'\n")
    assert "mnist.Train.epochs" in parsed("a.gin")


def test_a_file_included_by_two_others_is_no_cycle(write):
    write("base.gin", "toy.Data.count = 5\n")
    write("b.gin", "include 'base.gin'\n")
    write("c.gin", "include 'base.gin'\ntoy.Data.count = 6\n")
    write("a.gin", "include 'b.gin'\ninclude 'c.gin'\n")
    assert parsed("a.gin") == {"toy.Data.count": 6}


def test_a_cycle_of_includes_is_shown_with_the_line_that_closes_it(write):
    write("a.gin", "include 'deep/b.gin'\n")
    write("deep/b.gin", "# b\ninclude '../a.gin'\n")
    with fails("deep/b.gin:2: a.gin includes itself", "a.gin -> b.gin -> a.gin"):
        configuration.parse(["a.gin"])


def test_a_missing_include_names_the_line_and_the_closest_shipped_file(write):
    write("a.gin", "toy.Data.count = 5\ninclude 'include/mnits.gin'\n")
    with fails("a.gin:2: no Gin file 'include/mnits.gin'", "did you mean 'include/mnist.gin'?"):
        configuration.parse(["a.gin"])


def test_the_including_file_overrides_what_it_includes(write):
    write("base.gin", "toy.Data.count = 5\ntoy.Train.epochs = 2\n")
    write("a.gin", "include 'base.gin'\ntoy.Data.count = 6\n")
    assert parsed("a.gin") == {"toy.Data.count": 6, "toy.Train.epochs": 2}


def test_a_later_file_overrides_an_earlier_one_and_a_parameter_overrides_files(write):
    write("a.gin", "toy.Data.count = 5\ntoy.Train.epochs = 2\n")
    write("b.gin", "toy.Data.count = 6\ntoy.Train.epochs = 3\n")
    assert parsed("a.gin", "b.gin") == {"toy.Data.count": 6, "toy.Train.epochs": 3}
    assert parsed("a.gin", "b.gin", params=["toy.Data.count = 7", "toy.Data.count = 8"]) == {
        "toy.Data.count": 8,
        "toy.Train.epochs": 3,
    }


@pytest.mark.parametrize(
    "text",
    [
        "toy.Data.count = 5\n\ntoy.Data.count = 6\n",
        "toy.Data.count = 5\ntoy.Data:\n  count = 6\n",
        "count = 5\n\ncount = 6\n",
    ],
)
def test_a_setting_or_macro_bound_twice_in_one_file_is_refused_with_both_lines(write, text):
    write("a.gin", text)
    with fails("a.gin:3: ", "count was already set at a.gin:1"):
        configuration.parse(["a.gin"])


# Macros


def test_macros_are_replaced_wherever_they_stand(write):
    write(
        "a.gin",
        "width = 8\nwidths = (%width, (%width, [%width]))\n"
        "toy.Train.hidden = %widths\ntoy.Data.x = {'a': %width}\n",
    )
    assert parsed("a.gin") == {"toy.Train.hidden": (8, (8, [8])), "toy.Data.x": {"a": 8}}


def test_a_macro_may_be_defined_after_its_use_and_redefined_by_the_including_file(write):
    write("base.gin", "toy.Data.count = %count\ncount = 5\n")
    write("a.gin", "include 'base.gin'\ncount = 6\n")
    assert parsed("a.gin") == {"toy.Data.count": 6}
    assert parsed("a.gin", params=["count = 7"]) == {"toy.Data.count": 7}


def test_one_macro_may_serve_several_settings(write):
    write("a.gin", "n = 3\ntoy.Data.count = %n\ntoy.Train.epochs = %n\ntoy.Train.hidden = (%n, %n)\n")
    config = configuration.build(Config, configuration.parse(["a.gin"]), experiment="toy")
    assert (config.data.count, config.train.epochs, config.train.hidden) == (3, 3, (3, 3))


def test_an_undefined_macro_is_named_where_it_stands_with_the_closest_one():
    with fails("--gin_param 'toy.Data.count = %cuont': %cuont is not defined", "did you mean 'count'?"):
        built("count = 3", "toy.Data.count = %cuont")
    with fails("--gin_param 'n = (1, %m)': %m is not defined"):
        built("n = (1, %m)", "toy.Train.hidden = %n")


@pytest.mark.parametrize("macros", [["n = %n"], ["n = %m", "m = %n"], ["n = (1, %m)", "m = [%n]"]])
def test_a_macro_defined_by_itself_is_refused(macros):
    with fails("%n is defined by itself: %n -> "):
        built(*macros, "toy.Data.count = %n")


def test_an_unused_macro_is_refused_since_it_may_be_a_setting_without_its_section():
    with fails("--gin_param 'epochs = 3': the macro 'epochs' is never used", "write toy.Train.epochs"):
        built("epochs = 3")


# Imports


@pytest.mark.parametrize(
    ("statement", "module"), [("import a_module", "a_module"), ("from a_package import b", "a_package.b")]
)
def test_an_import_runs_only_with_permission(write, tmp_path, monkeypatch, statement, module):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write("a_module.py", "")
    write("a_package/__init__.py", "")
    write("a_package/b.py", "")
    write("a.gin", f"{statement}\ntoy.Data.count = 5\n")
    try:
        with fails(f"a.gin:1: imports '{module}', which would run its code", "--allow_imports"):
            configuration.parse(["a.gin"])
        assert module not in sys.modules
        assert parsed("a.gin", allow_imports=True) == {"toy.Data.count": 5}
        assert module in sys.modules
    finally:
        for name in ("a_module", "a_package", "a_package.b"):
            sys.modules.pop(name, None)


def test_permission_holds_for_included_files_and_a_missing_module_is_one_line(write):
    write("base.gin", "import no_such_module\n")
    write("a.gin", "include 'base.gin'\n")
    with fails("base.gin:1: imports 'no_such_module'", "--allow_imports"):
        configuration.parse(["a.gin"])
    with fails("base.gin:1: cannot import 'no_such_module'"):
        configuration.parse(["a.gin"], allow_imports=True)


# Types and ranges


@pytest.mark.parametrize(
    ("param", "words"),
    [
        ("toy.Data.count = 3.0", ["toy.Data.count = 3.0: must be an integer (how many toys)"]),
        ("toy.Data.count = True", ["toy.Data.count = True: must be an integer"]),
        ("toy.Data.count = '3'", ["toy.Data.count = '3': must be an integer"]),
        ("toy.Data.count = None", ["toy.Data.count = None: must be an integer"]),
        ("toy.Data.count = 0", ["toy.Data.count = 0: must be greater than or equal to 1"]),
        ("toy.Data.count = 101", ["toy.Data.count = 101: must be less than or equal to 100"]),
        ("toy.Data.path = 3", ["toy.Data.path = 3: must be a string"]),
        ("toy.Data.path = b'a'", ["toy.Data.path = b'a': must be a string"]),
        ("toy.Data.validation = 0.5", ["must be an integer or 'test'"]),
        ("toy.Data.validation = 'tset'", ["= 'tset'", "must be an integer or 'test'"]),
        ("toy.Data.kind = 'bal'", ["must be 'train', 'doll' or 'ball'", "did you mean 'ball'?"]),
        ("toy.Data.kind = 'Ball'", ["did you mean 'ball'?"]),
        ("toy.Data.kind = ('ball',)", ["= ('ball',): must be 'train', 'doll' or 'ball'"]),
        ("toy.Train.rate = True", ["toy.Train.rate = True: must be a number"]),
        ("toy.Train.rate = '0.1'", ["must be a number"]),
        ("toy.Train.rate = 0", ["must be greater than 0"]),
        ("toy.Train.rate = 10.0", ["must be less than 10"]),
        ("toy.Train.rate = 1e999", ["must be a finite number"]),
        ("toy.Train.shuffle = 1", ["toy.Train.shuffle = 1: must be a boolean"]),
        ("toy.Train.shuffle = 'True'", ["must be a boolean"]),
        ("toy.Train.hidden = [3, 4]", ["= [3, 4]: must be a tuple; write (3, 4)"]),
        ("toy.Train.hidden = [3]", ["must be a tuple; write (3,)"]),
        ("toy.Train.hidden = (3)", ["= 3: must be a tuple; write (3,)"]),
        ("toy.Train.hidden = {}", ["must be a tuple"]),
        ("toy.Train.hidden = (3, 4.0)", ["toy.Train.hidden[1] = 4.0: must be an integer (widths)"]),
        ("toy.Train.hidden = (None, 'a')", ["toy.Train.hidden[0] = None: must be an integer (widths)"]),
        (
            "toy.Train.scales = (1.0,)",
            ["= (1.0,): toy.Train.scales[1] is missing (smallest and largest size)"],
        ),
        ("toy.Train.scales = (1.0, 2.0, 3.0)", ["toy.Train.scales = (1.0, 2.0, 3.0): ", "at most 2 items"]),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_with_what_is_allowed(param, words):
    with fails(f"--gin_param {param!r}: ", *words):
        built(param)


def test_an_integer_is_taken_for_a_float_and_becomes_one():
    config = built("toy.Train.rate = 1", "toy.Train.scales = (1, 2)")
    assert repr(config.train.rate) == "1.0"
    assert repr(config.train.scales) == "(1.0, 2.0)"


def test_each_alternative_of_a_union_is_taken():
    assert built("toy.Data.validation = 7").data.validation == 7
    assert built("toy.Data.validation = 'test'").data.validation == "test"
    assert built("toy.Data.path = 'here'").data.path == "here"
    assert built("toy.Data.path = None").data.path is None


def test_what_nothing_binds_has_its_default():
    assert built() == Config(data=Data(), train=Train())


def test_a_rule_across_fields_is_reported_where_the_first_field_is_bound():
    with fails("--gin_param 'toy.Train.epochs = 9': toy.Train.epochs = 9 is more than toy.Data.count = 3"):
        built("toy.Train.epochs = 9")
    with fails("--gin_param 'toy.Train.epochs = 2': toy.Train.epochs = 2 is more than toy.Data.count = 1"):
        built("toy.Data.count = 1", "toy.Train.rate = 1.0", "toy.Train.epochs = 2")


def test_the_first_mistake_is_shown_and_the_others_are_counted():
    with fails("'toy.Data.cuont = 3'", "(and 2 more)"):
        built("toy.Data.cuont = 3", "toy.Train.rate = 'a'", "toy.Train.hidden = [1]")


# Names


def test_an_unknown_field_names_those_there_are_and_the_closest():
    with fails("toy.Data has no field 'cuont' (did you mean 'count'?); allowed: path, count, validation"):
        built("toy.Data.cuont = 3")


def test_an_unknown_section_names_those_there_are_and_the_closest():
    with fails("'toy' has no section 'toy.Date' (did you mean 'toy.Data'?); allowed: toy.Data, toy.Train"):
        built("toy.Date.count = 3")


@pytest.mark.parametrize("selector", ["Data", "toy.data", "data", "toy.sub.Data"])
def test_a_section_has_one_name_and_no_abbreviation(selector):
    with fails(f"has no section {selector!r} (did you mean 'toy.Data'?)"):
        built(f"{selector}.count = 3")


def test_a_section_cannot_be_bound_itself():
    with fails("toy.Data is a section; write toy.Data.<field> = value"):
        built("toy.Data = 3")


def test_a_scope_is_refused_with_the_name_to_write():
    with fails("a/toy.Data.count has the scope 'a'", "write toy.Data.count"):
        built("a/toy.Data.count = 3")


def test_a_private_attribute_is_no_field():
    with fails("toy.Data has no field '__class__'"):
        built("toy.Data.__class__ = 3")


# Frozen


def test_a_configuration_is_frozen():
    config = built()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data.count = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train = Train()
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.data.count
    assert config.data.count == 3


def test_a_section_made_in_python_is_as_strict_as_a_file():
    for wrong in ({"count": 3.0}, {"cuont": 3}, {"kind": "car"}):
        with pytest.raises(ValueError):
            Data(**wrong)


def test_two_configurations_do_not_influence_each_other():
    @section("toy.Data")
    class OtherData:
        """Another section under the same name."""

        count: str = setting("many", "how many toys")

    # Made by call, since the annotation of a local class cannot be looked up by name.
    other_config = dataclasses.make_dataclass(
        "OtherConfig", [("data", OtherData)], namespace={"check": lambda self: None}, frozen=True
    )
    first = built("toy.Data.count = 5", "n = 2", "toy.Train.epochs = %n")
    few = configuration.parse([], ["toy.Data.count = 'few'"])
    other = configuration.build(other_config, few, experiment="other")
    second = built()
    assert (first.data.count, first.train.epochs) == (5, 2)
    assert other.data.count == "few"
    assert second == Config(data=Data(), train=Train())
    with fails("%n is not defined"):
        built("toy.Train.epochs = %n")


# Saving


AWKWARD = (
    r"toy.Data.path = 'it\'s \"quoted\", a \\ and a \n, a % and an @, ünïcode \x00'",
    "toy.Data.validation = 'test'",
    "toy.Train.rate = 1e-7",
    "toy.Train.hidden = (9223372036854775808,)",
    "toy.Train.scales = (-1.5e-300, 1e22)",
    "toy.Train.shuffle = False",
)


@pytest.mark.parametrize("params", [(), AWKWARD, ("toy.Train.hidden = ()", "toy.Train.rate = 1")])
def test_a_configuration_written_as_gin_is_read_back_the_same(write, params):
    config = built(*params)
    write("saved.gin", configuration.as_gin(config))
    again = configuration.build(Config, configuration.parse(["saved.gin"]), experiment="toy")
    assert again == config
    assert configuration.as_dict(again) == configuration.as_dict(config)
    assert configuration.config_hash(again) == configuration.config_hash(config)


def test_a_configuration_written_as_gin_holds_every_field():
    text = configuration.as_gin(built("toy.Data.count = 5"))
    for line in ("toy.Data.count = 5", "toy.Data.path = None", "toy.Train.hidden = (4, 4)"):
        assert line in text.splitlines()
    fields = [f for cls in (Data, Train) for f in configuration.fields(cls)]
    assert len([line for line in text.splitlines() if line]) == len(fields)


@pytest.mark.parametrize("gin_file", ["gin/mnist_jax.gin", "gin/mnist_torch.gin", "gin/mnist_lightning.gin"])
def test_what_dry_run_prints_is_the_same_configuration(write, capsys, gin_file):
    argv = ["launch", f"--gin_file={gin_file}", "--gin_param=mnist.Model.hidden = (7,)", "--dry_run"]
    assert launch.main(argv) == 0
    write("printed.gin", capsys.readouterr().out)
    first = launch.resolve([gin_file], ["mnist.Model.hidden = (7,)"])
    again = launch.resolve(["printed.gin"], [])
    assert again.config == first.config
    assert again.config.model.hidden == (7,)
    assert (again.experiment, again.backend) == (first.experiment, first.backend)


def test_what_the_user_bound_is_written_with_sources_and_read_back_the_same(write):
    write("base.gin", "n = 4\ntoy.Data.count = 50\ntoy.Train.hidden = (%n, %n)\n")
    write("a.gin", "include 'base.gin'\ntoy.Data.count = 60\ntoy.Data.path = 'a--b'\n")
    bindings = configuration.parse(["a.gin"], ["toy.Train.epochs = 7"])
    text = configuration.bindings_as_gin(bindings)
    assert text.splitlines() == [
        "# base.gin",
        "toy.Train.hidden = (4, 4)",
        "",
        "# a.gin",
        "toy.Data.count = 60",
        "toy.Data.path = 'a--b'",
        "",
        "# --gin_param 'toy.Train.epochs = 7'",
        "toy.Train.epochs = 7",
    ]
    write("saved.gin", text)
    again = configuration.parse(["saved.gin"])
    assert configuration.build(Config, again, experiment="toy") == configuration.build(
        Config, bindings, experiment="toy"
    )


def test_a_file_whose_name_has_dashes_is_one_source(write):
    write("a--b.gin", "toy.Data.count = 60\ntoy.Train.epochs = 2\n")
    text = configuration.bindings_as_gin(configuration.parse(["a--b.gin"]))
    assert text == "# a--b.gin\ntoy.Data.count = 60\ntoy.Train.epochs = 2\n"


# Comparing


def test_as_dict_is_plain_json_by_attribute():
    assert configuration.as_dict(built("toy.Data.count = 5")) == {
        "data": {"path": None, "count": 5, "validation": 0, "kind": "ball"},
        "train": {"epochs": 1, "rate": 0.5, "shuffle": True, "hidden": [4, 4], "scales": [0.5, 2.0]},
    }


def test_the_hash_is_that_of_the_fields_that_a_resume_must_keep():
    plain = configuration.config_hash(built())
    assert configuration.config_hash(built("toy.Data.count = 3", "toy.Train.hidden = (4, 4)")) == plain
    assert configuration.config_hash(built("toy.Train.epochs = 2")) == plain
    assert configuration.config_hash(built("toy.Train.hidden = (4, 5)")) != plain
    assert configuration.config_hash(built("toy.Data.path = 'a'")) != plain


def test_changes_lists_saved_and_new_values_and_forbidden_changes_only_the_binding_ones():
    saved = configuration.as_dict(built())
    config = built("toy.Train.epochs = 2", "toy.Train.hidden = (5,)", "toy.Data.path = 'a'")
    assert configuration.changes(config, saved) == {
        "toy.Data.path": (None, "a"),
        "toy.Train.epochs": (1, 2),
        "toy.Train.hidden": ([4, 4], [5]),
    }
    assert configuration.forbidden_changes(config, saved) == {
        "toy.Data.path": (None, "a"),
        "toy.Train.hidden": ([4, 4], [5]),
    }
    assert configuration.changes(built(), saved) == {}


def test_a_field_that_was_not_there_yet_counts_as_having_had_its_default():
    saved = configuration.as_dict(built())
    del saved["train"]["hidden"]
    del saved["data"]
    assert configuration.changes(built(), saved) == {}
    assert configuration.forbidden_changes(built("toy.Train.hidden = (5,)"), saved) == {
        "toy.Train.hidden": ([4, 4], [5])
    }


def test_backend_device_logs_cadence_and_end_may_change_on_resume_and_nothing_else():
    first = launch.resolve(["gin/mnist_jax.gin"], [])
    may_change = {
        f"{cls.gin_name}.{field}"
        for cls in configuration.sections(type(first.config)).values()
        for field in configuration.fields(cls)
        if configuration.may_change(cls, field)
    }
    assert may_change == {
        "Run.experiment",
        "Run.backend",
        "Schedule.decay_steps",
        "mnist.Train.epochs",
        "mnist.Train.steps",
        "mnist.Train.stop_at",
        "mnist.Train.block_steps",
        "Checkpoint.every_steps",
        "Checkpoint.every_epochs",
        "Checkpoint.keep_last",
        "Checkpoint.keep_best",
        "Log.every_steps",
        "Log.tensorboard",
        "Log.wandb",
        "Log.wandb_project",
        "Log.histograms_every",
        "Log.progress",
    }
