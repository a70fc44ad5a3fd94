"""Strict Gin configuration: parse, validate, suggest, freeze, save.

A configuration is a set of *sections*: frozen pydantic dataclasses, each under its Gin name
(``Run``, ``Optimizer``, ``mnist.Train``, ...). Gin's own parser reads the files; the bindings are then
resolved here, without Gin's global registry, so that every mistake is one line naming the file and line,
what is allowed and the closest match, and so that two configurations never influence each other.
The launcher and the parity command call this module; it imports no framework.
"""

import dataclasses
import difflib
import hashlib
import importlib
import json
import re
import sys
import tokenize
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from blacksmith.errors import ConfigError
from gin import config_parser

T = TypeVar("T")

_PACKAGE = Path(__file__).resolve().parent


# Sections


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


def setting(default: Any, description: str, *, resume_may_change: bool = False, **constraints: Any) -> Any:
    """A field of a section.

    Args:
      default: the value when no file binds it; ``...`` makes it required.
      description: one line for the experiment's documentation, with the unit.
      resume_may_change: whether a resumed run may differ from its checkpoint in this field.
      **constraints: pydantic's (``gt``, ``ge``, ``lt``, ``le``, ``min_length``, ...).
    """
    return pydantic.Field(
        default,
        description=description,
        json_schema_extra={"resume_may_change": resume_may_change},
        **constraints,
    )


def sections(config_class: type) -> dict[str, type]:
    """The sections of an experiment's `Config` class, by attribute name."""
    return typing.get_type_hints(config_class)


def fields(section_class: type) -> dict[str, pydantic.fields.FieldInfo]:
    """The settings of a section, by name."""
    return section_class.__pydantic_fields__


def may_change(section_class: type, field: str) -> bool:
    """Whether a resumed run may differ from its checkpoint in this field."""
    return bool(fields(section_class)[field].json_schema_extra["resume_may_change"])


# Files


def gin_directory() -> Path:
    """Where the shipped Gin files are: inside an installed package, else beside a checkout's."""
    inside = _PACKAGE / "gin"
    return inside if inside.is_dir() else _PACKAGE.parent / "gin"


def find_file(name: str, *, beside: Path | None = None, where: str = "--gin_file") -> Path:
    """The Gin file called `name`.

    Looks at `name` itself, next to the including file, then among the shipped files (with or without a
    leading ``gin/``).

    Raises:
      ConfigError: there is none; names the closest shipped file.
    """
    shipped = gin_directory()
    inside = name.removeprefix("gin/")
    candidates = [Path(name), shipped / inside]
    if beside is not None:
        candidates.insert(0, beside / name)
    for path in candidates:
        if path.is_file():
            return path
        if path.is_dir() and name:
            raise ConfigError(f"{where}: {name!r} is a directory, not a Gin file")
    names = sorted(str(p.relative_to(shipped)) for p in shipped.rglob("*.gin"))
    raise ConfigError(
        f"{where}: no Gin file {name!r}{closest(inside, names)}; shipped files: "
        + ", ".join(f"gin/{n}" for n in names if "/" not in n)
    )


@dataclasses.dataclass(frozen=True)
class Binding:
    """One statement ``selector.field = value`` of a Gin file or flag, or a macro where `field` is empty."""

    selector: str
    field: str
    value: Any
    where: str
    text: str


@dataclasses.dataclass(frozen=True)
class _Macro:
    name: str


class _Delegate(config_parser.ParserDelegate):
    """Keeps macros as names and refuses references: a setting is a plain value."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        raise ValueError(
            f"'@{scoped_configurable_name}' is a reference; settings are plain values "
            "(numbers, strings, tuples, True, False, None, or %macro)"
        )

    def macro(self, macro_name: str) -> Any:
        return _Macro(macro_name)


def parse(files: Sequence[str], params: Sequence[str] = (), *, allow_imports: bool = False) -> list[Binding]:
    """Reads Gin files, then ``--gin_param`` bindings; later ones override earlier ones.

    Args:
      files: names as given by the user, see `find_file`.
      params: single bindings such as ``'mnist.Train.epochs = 3'``.
      allow_imports: whether ``import`` statements may run.

    Raises:
      ConfigError: a file is missing, includes itself, has a syntax error, binds a setting twice, uses a
        scope, or imports code without permission.
    """
    bindings: list[Binding] = []
    for name in files:
        path = find_file(name)
        bindings += _parse_file(path, display=name, allow_imports=allow_imports, parents=())
    for text in params:
        bindings += _parse_text(text, f"--gin_param {text!r}", None, allow_imports=allow_imports, parents=())
    return bindings


def _parse_file(path: Path, *, display: str, allow_imports: bool, parents: tuple[Path, ...]) -> list[Binding]:
    real = path.resolve()
    if real in parents:
        raise ConfigError(f"{display}: includes itself ({' -> '.join(p.name for p in parents)})")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{display}: cannot be read: {error}") from error
    return _parse_text(text, display, path, allow_imports=allow_imports, parents=(*parents, real))


def _parse_text(
    text: str,
    display: str,
    path: Path | None,
    *,
    allow_imports: bool,
    parents: tuple[Path, ...],
) -> list[Binding]:
    bindings: list[Binding] = []
    seen: dict[tuple[str, str], str] = {}
    for statement in _statements(text, display, is_file=path is not None):
        where = f"{display}:{statement.location.line_num}" if path else display
        match statement:
            case config_parser.ImportStatement():
                if not allow_imports:
                    raise ConfigError(
                        f"{where}: imports {statement.module!r}, which would run its code; "
                        "pass --allow_imports if you trust it"
                    )
                try:
                    importlib.import_module(statement.module)
                except ImportError as error:
                    raise ConfigError(f"{where}: cannot import {statement.module!r}: {error}") from error
            case config_parser.IncludeStatement():
                included = find_file(statement.filename, beside=path.parent if path else None, where=where)
                bindings += _parse_file(
                    included,
                    display=statement.filename,
                    allow_imports=allow_imports,
                    parents=parents,
                )
            case config_parser.BindingStatement():
                key = f"{statement.selector}.{statement.arg_name}"
                if statement.arg_name and statement.scope:
                    raise ConfigError(
                        f"{where}: {statement.scope}/{key} has the scope {statement.scope!r}; "
                        f"scopes are not used here, write {key}"
                    )
                selector = statement.selector
                if statement.scope:
                    selector = f"{statement.scope}/{selector}"
                if (selector, statement.arg_name) in seen:
                    raise ConfigError(
                        f"{where}: {key.rstrip('.')} was already set at "
                        f"{seen[selector, statement.arg_name]}; keep one of the two"
                    )
                seen[selector, statement.arg_name] = where
                bindings.append(
                    Binding(
                        selector,
                        statement.arg_name or "",
                        statement.value,
                        where,
                        statement.location.line_content.strip(),
                    )
                )
    return bindings


def _statements(text: str, display: str, *, is_file: bool) -> Iterable[Any]:
    """Gin's statements, with its several kinds of parse error turned into one."""
    if not is_file and not text.strip():
        raise ConfigError(f"{display}: is empty; write 'Section.field = value'")
    line = 1
    parser = None
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        for statement in parser:
            if hasattr(statement, "location") and statement.location.line_num:
                line = statement.location.line_num
            yield statement
    except ConfigError:
        raise
    except (SyntaxError, ValueError, tokenize.TokenError, IndexError) as error:
        if getattr(error, "lineno", None):
            line = error.lineno
        elif parser is not None and getattr(parser, "_current_token", None):
            line = parser._current_token.start[0]
        message = str(getattr(error, "msg", None) or error).strip().splitlines()[0].rstrip(".")
        if "malformed node" in message:
            message = "not a plain value (number, string, tuple, True, False, None or %macro)"
        source = text.splitlines()[line - 1].strip() if 0 < line <= len(text.splitlines()) else ""
        value = source.partition("=")[2].strip()
        hint = ""
        if re.fullmatch(r"[A-Za-z_][\w./-]*", value) and value not in ("True", "False", "None"):
            hint = f'; a string needs quotes: "{value}"'
        elif not value and source and "import" not in source and "include" not in source:
            hint = "; write Section.field = value"
        where = f"{display}:{line}" if is_file else display
        raise ConfigError(f"{where}: cannot be parsed: {message}{hint}") from error


def bound(bindings: Sequence[Binding], selector: str, field: str) -> Binding | None:
    """The binding that decides ``selector.field``, its macros resolved, or None."""
    found = [b for b in bindings if b.selector == selector and b.field == field]
    if not found:
        return None
    macros = {b.selector: b for b in bindings if not b.field}
    return dataclasses.replace(found[-1], value=_resolve(found[-1].value, macros, found[-1], set()))


def _resolve(value: Any, macros: Mapping[str, Binding], binding: Binding, used: set[str]) -> Any:
    if isinstance(value, _Macro):
        if value.name not in macros:
            raise ConfigError(f"{binding.where}: %{value.name} is not defined{closest(value.name, macros)}")
        if value.name in used and value == macros[value.name].value:
            raise ConfigError(f"{binding.where}: %{value.name} is defined by itself")
        used.add(value.name)
        return _resolve(macros[value.name].value, macros, binding, used)
    if isinstance(value, (list, tuple)):
        return type(value)(_resolve(v, macros, binding, used) for v in value)
    if isinstance(value, dict):
        return {k: _resolve(v, macros, binding, used) for k, v in value.items()}
    return value


# Building


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
            values[name][binding.field] = _resolve(binding.value, macros, binding, used)
            sources[name, binding.field] = binding
        except ConfigError as error:
            mistakes.append(str(error))
    for name, macro in macros.items():
        if name not in used:
            owners = [f"{n}.{name}" for n, cls in by_name.items() if name in fields(cls)]
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
            mistakes.append(str(error))
    if mistakes:
        more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        raise ConfigError(mistakes[0] + more)
    return config


def _section_name(binding: Binding, by_name: Mapping[str, type], experiment: str) -> str:
    matches = [n for n in by_name if n == binding.selector or n.endswith("." + binding.selector)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(
            f"{binding.where}: {binding.selector!r} could be {' or '.join(matches)}; write one of them"
        )
    raise ConfigError(
        f"{binding.where}: the experiment {experiment!r} has no section {binding.selector!r}"
        f"{_closest_section(binding.selector, by_name)}; allowed: {', '.join(by_name)}"
    )


def _closest_section(selector: str, names: Iterable[str]) -> str:
    """Like `closest`, where the last part of a section's name may stand for the whole."""
    whole = closest(selector, names)
    last = {n.rpartition(".")[2]: n for n in names}
    found = difflib.get_close_matches(selector.rpartition(".")[2], last, n=1, cutoff=0.55)
    return whole or (f"; did you mean {last[found[0]]!r}?" if found else "")


def _explain(
    errors: Sequence[Mapping[str, Any]],
    cls: type,
    sources: Mapping[tuple[str, str], Binding],
) -> str:
    """One readable line for pydantic's errors of one field; a union has one for each alternative."""
    error = errors[0]
    field = str(error["loc"][0]) if error["loc"] else ""
    binding = sources.get((cls.gin_name, field))
    value = error.get("input")
    message = " or ".join(e["msg"] for e in errors).replace("Input should be", "must be")
    message = message.replace(" or must be", " or")
    if not field:
        return f"{cls.gin_name}: {message}"
    name = f"{cls.gin_name}.{field}"
    if error["type"] == "missing":
        return f"{name} is required: {fields(cls)[field].description}"
    where = f"{binding.where}: " if binding else ""
    hint = ""
    if error["type"] == "literal_error" and isinstance(value, str):
        hint = closest(value, re.findall(r"'([^']*)'", str(error["ctx"]["expected"])))
    elif error["type"] == "tuple_type" and isinstance(value, list):
        hint = f"; write ({', '.join(map(repr, value))}{',' if len(value) == 1 else ''})"
    elif error["type"] == "tuple_type" and isinstance(value, int):
        hint = f"; write ({value!r},)"
    return f"{where}{name} = {value!r}: {message}{hint} ({fields(cls)[field].description})"


def closest(name: str, names: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the name nearest to `name`, or nothing."""
    by_lower = {n.lower(): n for n in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.55)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""


# Saving and comparing


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


def bindings_as_gin(bindings: Sequence[Binding]) -> str:
    """What the user bound, in order, with includes inlined and a comment naming each source."""
    lines: list[str] = []
    last = ""
    macros = {b.selector: b for b in bindings if not b.field}
    decided = {(b.selector, b.field): b for b in bindings}
    for binding in bindings:
        if not binding.field or decided[binding.selector, binding.field] is not binding:
            continue
        source = binding.where if "--" in binding.where else binding.where.rpartition(":")[0]
        if source != last:
            lines += ["", f"# {source}"]
            last = source
        value = _resolve(binding.value, macros, binding, set())
        lines.append(f"{binding.selector}.{binding.field} = {value!r}")
    return "\n".join(lines).strip() + "\n"


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


def forbidden_changes(config: Any, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Those of `changes` that a resumed run must not make."""
    classes = {type(getattr(config, n)).gin_name: type(getattr(config, n)) for n in _names(config)}
    return {
        key: pair
        for key, pair in changes(config, saved).items()
        if not may_change(classes[key.rpartition(".")[0]], key.rpartition(".")[2])
    }


def _names(config: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(config)]


def import_module(name: str, *, what: str) -> Any:
    """Imports `name`; a module that does not exist is a ConfigError naming `what` asked for it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"{what}: no module {name!r} on the Python path ({sys.path[0] or 'current directory'})"
            ) from error
        raise
