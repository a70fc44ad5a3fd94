"""Sections: the frozen, strictly typed dataclasses that make up a configuration."""

import dataclasses
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from blacksmith.config import conditions
from blacksmith.config.conditions import Conditions
from blacksmith.config.gin_files import Binding, resolve_macros
from blacksmith.errors import ConfigError, closest, shown

T = TypeVar("T")


def section(
    name: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    unused: Mapping[str, str] | None = None,
    only_with: Conditions | None = None,
) -> Callable[[type[T]], type[T]]:
    """Makes a class the section that Gin files call `name`, for example ``mnist.Train``.

    The class becomes a frozen, strictly typed pydantic dataclass. It may inherit from another section, and
    may have a method `check` for rules that span its fields.

    Args:
      name: the name in Gin files.
      defaults: other defaults of inherited fields.
      unused: inherited fields that have no effect here, with the reason; setting one is an error.
      only_with: the conditions under which the section's fields have an effect, see `setting`.
    """

    def decorate(cls: type[T]) -> type[T]:
        for field in {**vars(cls).get("__annotations__", {}), **(defaults or {})}:
            own = getattr(cls, field, None)
            if field in (defaults or {}) and field not in cls.__pydantic_fields__:
                raise TypeError(f"{name}: defaults names {field!r}, which is no inherited setting")
            if field not in (defaults or {}) and not isinstance(own, pydantic.fields.FieldInfo):
                raise TypeError(f"{name}.{field}: declare it with setting(default, description)")
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
        cls.gin_name, cls.gin_unused = name, dict(unused or {})
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
    location: bool = False,
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
      location: whether the field may be the path of what a run reads, apart from which it must write.
      **constraints: pydantic's (``gt``, ``ge``, ``lt``, ``le``, ``min_length``, ...).
    """
    own = {
        "resume_may_change": resume_may_change,
        "evaluation_may_change": evaluation_may_change,
        "only_with": only_with,
        "location": location,
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


def locations(config: Any) -> dict[str, str]:
    """What a run reads from where, as far as its settings say so: ``{"nerf.Data.scene": "/scenes/lego"}``."""
    return {
        f"{part.gin_name}.{field}": value
        for part in _parts(config).values()
        for field, info in fields(type(part)).items()
        if info.json_schema_extra["location"] and (value := getattr(part, field)) is not None
    }


def build(config_class: type[T], bindings: Sequence[Binding], *, experiment: str) -> T:
    """Validates all bindings against the sections of `config_class`; returns an instance of it.

    `config_class` is a dataclass whose fields are sections. Its method `check`, if any, holds the rules that
    span sections. The first mistake raises `ConfigError`.
    """
    by_name = {cls.gin_name: cls for cls in sections(config_class).values()}
    macros = {b.selector: b for b in bindings if not b.field}
    used: set[str] = set()
    values: dict[str, dict[str, Any]] = {name: {} for name in by_name}
    sources: dict[tuple[str, str], Binding] = {}
    for binding in bindings:
        if binding.field:
            value = resolve_macros(binding.value, macros, binding, used)
            if _has_effect(binding, by_name, value, experiment):
                values[binding.selector][binding.field] = value
                sources[binding.selector, binding.field] = binding
    for name, macro in macros.items():
        if name not in used:
            hint = "a setting is written Section.field = value"
            raise ConfigError(f"{macro.where}: the macro {name!r} is never used; {hint}")
    built = {}
    for attribute, cls in sections(config_class).items():
        try:
            built[attribute] = cls(**values[cls.gin_name])
        except pydantic.ValidationError as error:
            raise ConfigError(_explain(error.errors(), cls, sources)) from error
    config = config_class(**built)
    try:
        _check_effects(config)
        for checked in (*built.values(), config):
            if hasattr(checked, "check"):
                checked.check()
    except ConfigError as error:
        raise ConfigError(_located(str(error), sources)) from error
    return config


def _has_effect(binding: Binding, by_name: Mapping[str, type], value: Any, experiment: str) -> bool:
    """False for an unused field that is set to None or its default; raises `ConfigError` for other names."""
    name, field, where = binding.selector, binding.field, binding.where
    if name not in by_name:
        raise ConfigError(
            f"{where}: the experiment {experiment!r} has no section {name!r}{closest(name, by_name)}; "
            f"allowed: {', '.join(by_name)}"
        )
    cls = by_name[name]
    if field in fields(cls):
        return True
    if field not in cls.gin_unused:
        # Shared settings have sections of their own: it is Optimizer.epsilon, not nerf.Train.epsilon.
        elsewhere = [f"{other.gin_name}.{field}" for other in by_name.values() if field in fields(other)]
        near = f" (did you mean {elsewhere[0]}?)" if len(elsewhere) == 1 else closest(field, fields(cls))
        raise ConfigError(f"{where}: {name} has no field {field!r}{near}; allowed: {', '.join(fields(cls))}")
    if value is not None and value != cls.__pydantic_fields__[field].get_default():
        raise ConfigError(
            f"{where}: {name}.{field} = {shown(value)} has no effect here: {cls.gin_unused[field]}"
        )
    return False


def _check_effects(config: Any) -> None:
    """Raises `ConfigError` for a setting that was changed while its `only_with` does not hold."""
    parts = _parts(config).values()
    values = {f"{p.gin_name}.{field}": getattr(p, field) for p in parts for field in fields(type(p))}
    for part in parts:
        for field, info in fields(type(part)).items():
            key = f"{part.gin_name}.{field}"
            needs = info.json_schema_extra["only_with"] or part.gin_only_with
            if needs and values[key] != info.get_default() and not conditions.hold(needs, values):
                words = conditions.in_words(needs)
                raise ConfigError(f"{key} = {shown(values[key])} has no effect unless {words}")


def _explain(
    errors: Sequence[Mapping[str, Any]], cls: type, sources: Mapping[tuple[str, str], Binding]
) -> str:
    """One readable line for the first of pydantic's errors; a union has one per alternative."""
    error = errors[0]
    field, value = error["loc"][0], error["input"]
    name, description = f"{cls.gin_name}.{field}", fields(cls)[field].description
    if (cls.gin_name, field) not in sources:
        return f"{name} is required: {description}"
    # The position of the wrong value in a tuple, such as [1], or nothing.
    indices = ["".join(f"[{i}]" for i in e["loc"][1:] if isinstance(i, int)) for e in errors]
    alternatives = [e["msg"] for e, at in zip(errors, indices) if e["loc"][0] == field and at == indices[0]]
    message = " or ".join(alternatives).replace("Input should be", "must be").replace(" or must be", " or")
    near = hint = ""
    if error["type"] == "literal_error" and isinstance(value, str):
        near = closest(value, re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    elif error["type"] == "tuple_type" and isinstance(value, (list, int)):
        hint = f"; write {tuple(value) if isinstance(value, list) else (value,)}"
    where = sources[cls.gin_name, field].where
    return f"{where}: {name}{indices[0]} = {shown(value)}{near}: {message}{hint} ({description})"


def _located(message: str, sources: Mapping[tuple[str, str], Binding]) -> str:
    """`message` after the place where the first of the fields that it names is bound."""
    for key in re.findall(r"([A-Za-z_][\w.]*)\.(\w+)", message):
        if key in sources:
            return f"{sources[key].where}: {message}"
    return message


def as_dict(config: Any) -> dict[str, dict[str, Any]]:
    """The configuration as plain JSON values: ``{section attribute: {field: value}}``."""
    values = {
        name: {field: getattr(part, field) for field in fields(type(part))}
        for name, part in _parts(config).items()
    }
    return json.loads(json.dumps(values))


def as_gin(config: Any) -> str:
    """The whole configuration, defaults included, as a Gin file that parses to the same configuration."""
    lines = []
    for part in _parts(config).values():
        lines += [f"{part.gin_name}.{field} = {getattr(part, field)!r}" for field in fields(type(part))]
        lines.append("")
    return "\n".join(lines)


def changes(
    config: Any, saved: Mapping[str, Mapping[str, Any]], *, forbidden_in: str | None = None
) -> dict[str, tuple[Any, Any]]:
    """The fields that differ from a saved `as_dict`: ``{"mnist.Train.seed": (saved, new)}``.

    A field that the saved configuration lacks counts as having had its default. With `forbidden_in`, only
    those that a run in this mode must not change.
    """
    different = {}
    for name, part in as_dict(config).items():
        cls = type(getattr(config, name))
        for field, value in part.items():
            old = saved.get(name, {}).get(field, fields(cls)[field].get_default())
            old = json.loads(json.dumps(old, default=str))
            allowed = forbidden_in is not None and may_change(cls, field, mode=forbidden_in)
            if old != value and not allowed:
                different[f"{cls.gin_name}.{field}"] = (old, value)
    return different


def _parts(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
