"""Sections: the frozen, strictly typed dataclasses that a configuration is made of.

A section is declared with `section` and `setting`; `build` validates bindings against all sections of an
experiment and freezes them. The launcher and the parity command call this module; it imports no framework.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from blacksmith.config.gin_files import Binding, resolve_macros
from blacksmith.errors import ConfigError, closest

T = TypeVar("T")


def section(name: str) -> typing.Callable[[type[T]], type[T]]:
    """Declares a class to be the section that Gin files call `name`, for example ``mnist.Train``.

    The class becomes a frozen, strictly typed pydantic dataclass that refuses unknown fields.
    """

    def decorate(cls: type[T]) -> type[T]:
        cls = pydantic_dataclass(
            cls,
            frozen=True,
            kw_only=True,
            config=pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False),
        )
        cls.gin_name = name
        return cls

    return decorate


def setting(
    default: Any,
    description: str,
    *,
    resume_may_change: bool = False,
    evaluation_may_change: bool = False,
    **constraints: Any,
) -> Any:
    """A field of a section.

    Args:
      default: the value when no file binds it; ``...`` makes it required.
      description: one line for the experiment's documentation, with the unit.
      resume_may_change: whether a resumed run may differ from its checkpoint in this field.
      evaluation_may_change: whether an evaluation of a checkpoint may, besides.
      **constraints: pydantic's (``gt``, ``ge``, ``lt``, ``le``, ``min_length``, ...).
    """
    return pydantic.Field(
        default,
        description=description,
        json_schema_extra={
            "resume_may_change": resume_may_change,
            "evaluation_may_change": resume_may_change or evaluation_may_change,
        },
        **constraints,
    )


def sections(config_class: type) -> dict[str, type]:
    """The sections of an experiment's `Config` class, by attribute name."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def fields(section_class: type) -> dict[str, pydantic.fields.FieldInfo]:
    """The settings of a section, by name."""
    return section_class.__pydantic_fields__


def may_change(section_class: type, field: str, *, mode: str = "train") -> bool:
    """Whether a run that goes on from a checkpoint may differ from it in this field.

    In another mode than ``train`` the checkpoint is only evaluated or exported.
    """
    rule = "resume_may_change" if mode == "train" else "evaluation_may_change"
    return bool(fields(section_class)[field].json_schema_extra[rule])


def build(config_class: type[T], bindings: Sequence[Binding], *, experiment: str) -> T:
    """Validates all bindings against the sections of `config_class` and freezes them.

    Args:
      config_class: a dataclass whose fields are sections; its `check()` holds the cross-field rules.
      bindings: from `parse`.
      experiment: the chosen experiment, for messages.

    Raises:
      ConfigError: the first mistake found, and how many more there are.
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
            allowed = fields(by_name[name])
            if binding.field not in allowed:
                raise ConfigError(
                    f"{binding.where}: {name} has no field {binding.field!r}"
                    f"{closest(binding.field, allowed)}; allowed: {', '.join(allowed)}"
                )
            values[name][binding.field] = resolve_macros(binding.value, macros, binding, used)
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
        try:
            config.check()
        except ConfigError as error:
            mistakes.append(_located(str(error), sources))
    if mistakes:
        more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        raise ConfigError(mistakes[0] + more)
    return config


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
    """Like `closest`, where the last part of a section's name may stand for the whole."""
    whole = closest(selector, names)
    last = {n.rpartition(".")[2]: n for n in names}
    found = difflib.get_close_matches(selector.rpartition(".")[2], last, n=1, cutoff=0.55)
    return whole or (f" (did you mean {last[found[0]]!r}?)" if found else "")


def _explain(
    errors: Sequence[Mapping[str, Any]],
    cls: type,
    sources: Mapping[tuple[str, str], Binding],
) -> str:
    """One readable line for pydantic's errors of one field; a union has one for each alternative."""
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
    """Where in a tuple a value is wrong: ``[1]``, or nothing."""
    return "".join(f"[{part}]" for part in error["loc"][1:] if isinstance(part, int))


def _located(message: str, sources: Mapping[tuple[str, str], Binding]) -> str:
    """A message about several fields, after the place where the first of those that a file binds is bound."""
    for key in re.findall(r"([A-Za-z_][\w.]*)\.(\w+)", message):
        if key in sources:
            return f"{sources[key].where}: {message}"
    return message


def as_dict(config: Any) -> dict[str, dict[str, Any]]:
    """The configuration as plain JSON values: ``{section attribute: {field: value}}``."""
    return json.loads(
        json.dumps({name: dataclasses.asdict(getattr(config, name)) for name in _names(config)})
    )


def as_gin(config: Any) -> str:
    """The whole configuration, defaults included, as a Gin file that parses to the same one."""
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
    """Those of `changes` that a run in `mode` must not make."""
    classes = {type(getattr(config, n)).gin_name: type(getattr(config, n)) for n in _names(config)}
    return {
        key: pair
        for key, pair in changes(config, saved).items()
        if not may_change(classes[key.rpartition(".")[0]], key.rpartition(".")[2], mode=mode)
    }


def _names(config: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(config)]
