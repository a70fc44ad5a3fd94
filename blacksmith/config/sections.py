"""Sections: the frozen, strictly typed dataclasses that make up a configuration.

A section is declared with `section` and `setting`. `build` validates the bindings of Gin files against all
sections of an experiment.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from blacksmith.config import conditions
from blacksmith.config.conditions import Conditions
from blacksmith.config.gin_files import Binding, resolve_macros
from blacksmith.errors import ConfigError, closest

T = TypeVar("T")


def section(
    name: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    unused: Mapping[str, str] | None = None,
    moved: Mapping[str, str] | None = None,
    only_with: Conditions | None = None,
) -> Callable[[type[T]], type[T]]:
    """Makes a class the section that Gin files call `name`, for example ``mnist.Train``.

    The class becomes a frozen, strictly typed pydantic dataclass that refuses unknown fields. `build` calls
    its method `check`, if it has one. A class that inherits from another section may change what it inherits.

    Args:
      name: the name in Gin files.
      defaults: other defaults of inherited fields.
      unused: inherited fields that this experiment has no use for, with the reason; setting one is an error.
      moved: fields that existed once, with the full name that replaced them; an error says the new name.
      only_with: the conditions under which the section's fields have an effect, see `setting`.
    """

    def decorate(cls: type[T]) -> type[T]:
        for field, default in (defaults or {}).items():
            inherited = cls.__pydantic_fields__[field]
            cls.__annotations__[field] = inherited.annotation
            setattr(cls, field, setting(default, inherited.description, **inherited.json_schema_extra))
        cls = pydantic_dataclass(
            cls,
            frozen=True,
            kw_only=True,
            config=pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False),
        )
        cls.gin_name, cls.gin_unused, cls.gin_moved = name, dict(unused or {}), dict(moved or {})
        cls.gin_only_with = only_with
        return cls

    return decorate


def setting(
    default: Any,
    description: str,
    *,
    resume_may_change: bool = False,
    evaluation_may_change: bool = False,
    only_with: Conditions | None = None,
    **constraints: Any,
) -> Any:
    """A field of a section.

    Args:
      default: the value if no file binds it; ``...`` makes the field required.
      description: one line for the documentation, with the unit.
      resume_may_change: whether a resumed run may differ from its checkpoint in this field.
      evaluation_may_change: whether ``--mode=eval`` and ``export`` may also differ from the checkpoint.
      only_with: when the field has an effect: ``{"Optimizer.name": ("sgd", "rmsprop")}``. Otherwise any value
        but the default is an error.
      **constraints: pydantic's (``gt``, ``ge``, ``lt``, ``le``, ``min_length``, ...).
    """
    own = {
        "resume_may_change": resume_may_change,
        "evaluation_may_change": evaluation_may_change,
        "only_with": only_with,
    }
    return pydantic.Field(
        default, description=description, json_schema_extra={**own, **constraints}, **constraints
    )


def sections(config_class: type) -> dict[str, type]:
    """The sections of an experiment's `Config` class, by attribute name."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def fields(section_class: type) -> dict[str, pydantic.fields.FieldInfo]:
    """The settings of a section by name, without those that are unused."""
    every = section_class.__pydantic_fields__
    return {name: field for name, field in every.items() if name not in section_class.gin_unused}


def may_change(section_class: type, field: str, *, mode: str = "train") -> bool:
    """Whether a run in `mode` may differ in this field from the checkpoint that it starts from."""
    extra = fields(section_class)[field].json_schema_extra
    return extra["resume_may_change"] or (mode != "train" and extra["evaluation_may_change"])


def build(config_class: type[T], bindings: Sequence[Binding], *, experiment: str) -> T:
    """Validates all bindings against the sections of `config_class` and freezes them.

    Args:
      config_class: a dataclass whose fields are sections. If it has a method `check`, that holds the rules
        that span sections.
      bindings: from `parse`.
      experiment: the experiment's name, for messages.

    Raises:
      ConfigError: the first mistake, and how many more there are.
    """
    by_name = {cls.gin_name: cls for cls in sections(config_class).values()}
    macros = {b.selector: b for b in bindings if not b.field}
    used: set[str] = set()
    values: dict[str, dict[str, Any]] = {name: {} for name in by_name}
    sources: dict[tuple[str, str], Binding] = {}
    mistakes: list[str] = []
    for binding in bindings:
        if not binding.field:
            continue
        try:
            name = _section_name(binding, by_name, experiment)
            value = resolve_macros(binding.value, macros, binding, used)
            if _check_field(binding, by_name[name], value):
                values[name][binding.field] = value
                sources[name, binding.field] = binding
        except ConfigError as error:
            mistakes.append(str(error))
    for name, macro in macros.items():
        if name not in used:
            owners = [f"{n}.{name}" for n, cls in by_name.items() if name in fields(cls)]
            owners += [f"{n}.<field>" for n in by_name if n == name]
            hint = f"; to set a field write {' or '.join(owners)}" if owners else ""
            mistakes.append(f"{macro.where}: the macro {name!r} is never used{hint}")
    built = {}
    for attribute, cls in sections(config_class).items():
        try:
            built[attribute] = cls(**values[cls.gin_name])
        except pydantic.ValidationError as error:
            by_field: dict[str, list[Any]] = {}
            for part in error.errors():
                by_field.setdefault(str(part["loc"][:1]), []).append(part)
            mistakes += [_explain(parts, cls, sources) for parts in by_field.values()]
    if not mistakes:
        config = config_class(**built)
        mistakes += [_located(message, sources) for message in _without_effect(config)]
    if not mistakes:
        try:
            for checked in (*built.values(), config):
                if hasattr(checked, "check"):
                    checked.check()
        except ConfigError as error:
            mistakes.append(_located(str(error), sources))
    if mistakes:
        more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        raise ConfigError(mistakes[0] + more)
    return config


def _check_field(binding: Binding, cls: type, value: Any) -> bool:
    """Whether a section takes this binding; False for an unused field that is set to None or its default."""
    name, field, allowed = cls.gin_name, binding.field, fields(cls)
    if field in allowed:
        return True
    if field in cls.gin_moved:
        raise ConfigError(f"{binding.where}: {name}.{field} is now {cls.gin_moved[field]}")
    if field in cls.gin_unused:
        if value is None or value == cls.__pydantic_fields__[field].get_default():
            return False
        raise ConfigError(
            f"{binding.where}: {name}.{field} = {value!r} has no effect here: {cls.gin_unused[field]}"
        )
    raise ConfigError(
        f"{binding.where}: {name} has no field {field!r}{closest(field, allowed)}; "
        f"allowed: {', '.join(allowed)}"
    )


def _without_effect(config: Any) -> Iterable[str]:
    """A message for each setting that was changed while its `only_with` does not hold."""
    parts = [getattr(config, name) for name in _names(config)]
    values = {
        f"{part.gin_name}.{field}": getattr(part, field) for part in parts for field in fields(type(part))
    }
    for part in parts:
        for field, info in fields(type(part)).items():
            key = f"{part.gin_name}.{field}"
            only_with = info.json_schema_extra["only_with"] or part.gin_only_with
            if only_with and values[key] != info.get_default() and not conditions.hold(only_with, values):
                yield f"{key} = {values[key]!r} has no effect unless {conditions.in_words(only_with)}"


def _section_name(binding: Binding, by_name: Mapping[str, type], experiment: str) -> str:
    if binding.selector in by_name:
        return binding.selector
    whole = f"{binding.selector}.{binding.field}"
    if whole in by_name:
        raise ConfigError(f"{binding.where}: {whole} is a section; write {whole}.<field> = value")
    raise ConfigError(
        f"{binding.where}: the experiment {experiment!r} has no section {binding.selector!r}"
        f"{_closest_section(binding.selector, by_name)}; allowed: {', '.join(by_name)}"
    )


def _closest_section(selector: str, names: Iterable[str]) -> str:
    """Like `closest`, but the last part of a section's name is enough."""
    whole = closest(selector, names)
    last = {n.rpartition(".")[2]: n for n in names}
    found = difflib.get_close_matches(selector.rpartition(".")[2], last, n=1, cutoff=0.55)
    return whole or (f" (did you mean {last[found[0]]!r}?)" if found else "")


def _explain(
    errors: Sequence[Mapping[str, Any]],
    cls: type,
    sources: Mapping[tuple[str, str], Binding],
) -> str:
    """One readable line for pydantic's errors of one field; a union has one per alternative."""
    error = errors[0]
    field = str(error["loc"][0]) if error["loc"] else ""
    index = _index(error)
    errors = [e for e in errors if _index(e) == index]
    binding = sources.get((cls.gin_name, field))
    value = error.get("input")
    message = " or ".join(e["msg"] for e in errors).replace("Input should be", "must be")
    message = message.replace(" or must be", " or").replace("a valid integer", "an integer")
    message = message.replace("a valid ", "a ")
    if not field:
        return f"{cls.gin_name}: {message}"
    name = f"{cls.gin_name}.{field}"
    where = f"{binding.where}: " if binding else ""
    if error["type"] == "missing" and index:
        return f"{where}{name} = {value!r}: {name}{index} is missing ({fields(cls)[field].description})"
    if error["type"] == "missing":
        return f"{name} is required: {fields(cls)[field].description}"
    near = hint = ""
    if error["type"] == "literal_error" and isinstance(value, str):
        near = closest(value, re.findall(r"'([^']*)'", str(error["ctx"]["expected"])))
    elif error["type"] == "tuple_type" and isinstance(value, list):
        hint = f"; write ({', '.join(map(repr, value))}{',' if len(value) == 1 else ''})"
    elif error["type"] == "tuple_type" and isinstance(value, int):
        hint = f"; write ({value!r},)"
    return f"{where}{name}{index} = {value!r}{near}: {message}{hint} ({fields(cls)[field].description})"


def _index(error: Mapping[str, Any]) -> str:
    """The position of the wrong value in a tuple, such as ``[1]``, or nothing."""
    return "".join(f"[{part}]" for part in error["loc"][1:] if isinstance(part, int))


def _located(message: str, sources: Mapping[tuple[str, str], Binding]) -> str:
    """`message` after the place where the first of the fields that it names is bound."""
    for key in re.findall(r"([A-Za-z_][\w.]*)\.(\w+)", message):
        if key in sources:
            return f"{sources[key].where}: {message}"
    return message


def as_dict(config: Any) -> dict[str, dict[str, Any]]:
    """The configuration as plain JSON values: ``{section attribute: {field: value}}``."""
    parts = {name: getattr(config, name) for name in _names(config)}
    values = {name: {f: getattr(part, f) for f in fields(type(part))} for name, part in parts.items()}
    return json.loads(json.dumps(values))


def as_gin(config: Any) -> str:
    """The whole configuration, defaults included, as a Gin file that parses to the same configuration."""
    lines = []
    for name in _names(config):
        part = getattr(config, name)
        lines += [f"{type(part).gin_name}.{field} = {getattr(part, field)!r}" for field in fields(type(part))]
        lines.append("")
    return "\n".join(lines)


def config_hash(config: Any) -> str:
    """sha256 of the fields that a resumed run must not change."""
    fixed = {
        name: {
            field: value
            for field, value in part.items()
            if not may_change(type(getattr(config, name)), field)
        }
        for name, part in as_dict(config).items()
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def changes(config: Any, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """The fields that differ from a saved `as_dict`: ``{"mnist.Train.seed": (saved, new)}``.

    A field that the saved configuration lacks counts as having had its default.
    """
    different = {}
    for name, part in as_dict(config).items():
        cls = type(getattr(config, name))
        for field, value in part.items():
            old = saved.get(name, {}).get(field, fields(cls)[field].get_default())
            old = json.loads(json.dumps(old, default=str))
            if old != value:
                different[f"{cls.gin_name}.{field}"] = (old, value)
    return different


def forbidden_changes(
    config: Any, saved: Mapping[str, Mapping[str, Any]], *, mode: str = "train"
) -> dict[str, tuple[Any, Any]]:
    """The `changes` that a run in `mode` must not make."""
    classes = {type(getattr(config, n)).gin_name: type(getattr(config, n)) for n in _names(config)}
    return {
        key: pair
        for key, pair in changes(config, saved).items()
        if not may_change(classes[key.rpartition(".")[0]], key.rpartition(".")[2], mode=mode)
    }


def _names(config: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(config)]
