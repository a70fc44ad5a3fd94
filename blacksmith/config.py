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
import os
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


# Files


def gin_directory() -> Path:
    """Where the shipped Gin files are: inside an installed package, else beside a checkout's."""
    inside = _PACKAGE / "gin"
    return inside if inside.is_dir() else _PACKAGE.parent / "gin"


def find_file(name: str, *, beside: Path | None = None, where: str = "--gin_file") -> Path:
    """The Gin file called `name`.

    Looks next to the including file, at `name` itself, then among the shipped files (with or without a
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
        # os.path, since Path.is_file raises for a name too long or a directory that may not be read.
        if os.path.isfile(path):
            return path
        if os.path.isdir(path) and name:
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
        bindings += _parse_file(path, name, where="--gin_file", allow_imports=allow_imports, parents=())
    for text in params:
        bindings += _parse_text(text, f"--gin_param {text!r}", None, allow_imports=allow_imports, parents=())
    return bindings


def _parse_file(
    path: Path, display: str, *, where: str, allow_imports: bool, parents: tuple[Path, ...]
) -> list[Binding]:
    real = path.resolve()
    if real in parents:
        circle = " -> ".join(p.name for p in (*parents[parents.index(real) :], real))
        raise ConfigError(f"{where}: {display} includes itself: {circle}")
    try:
        text = path.read_text(encoding="utf-8-sig")
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
                    reason = " ".join(str(error).split())
                    raise ConfigError(f"{where}: cannot import {statement.module!r}: {reason}") from error
            case config_parser.IncludeStatement():
                beside = path.parent if path else None
                included = find_file(statement.filename, beside=beside, where=where)
                shown = statement.filename
                if beside and included == beside / shown:
                    shown = os.path.normpath(os.path.join(os.path.dirname(display), shown))
                bindings += _parse_file(
                    included, shown, where=where, allow_imports=allow_imports, parents=parents
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
        yield from parser
    except (SyntaxError, ValueError, TypeError, RecursionError, tokenize.TokenError) as error:
        if getattr(error, "lineno", None):
            line = error.lineno
        elif parser is not None:
            line = parser.current_token.start[0]
        lines = text.split("\n")
        source = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        where = f"{display}:{line}" if is_file else display
        raise ConfigError(f"{where}: cannot be parsed: {_syntax_message(error, source)}") from error


def _syntax_message(error: Exception, source: str) -> str:
    """What is wrong with the line `source`, in the terms of someone who writes settings."""
    message = error.args[0] if isinstance(error, tokenize.TokenError) else getattr(error, "msg", str(error))
    message = (message.strip() or type(error).__name__).splitlines()[0].partition("  Got ")[0].rstrip(".")
    key, equals, value = (part.strip() for part in source.partition("#")[0].partition("="))
    keyword, _, operand = key.partition(" ")
    if keyword == "include":
        return f'expected a file name in quotes: include "{operand or "file.gin"}"'
    if keyword in ("import", "from"):
        return "expected import package.module"
    if "EOF in multi-line" in message:
        return "a bracket or a quote is never closed"
    if message.startswith("Expected indentation"):
        return "after 'Section:' come indented lines 'field = value'"
    if message.startswith("Expected ',' or"):
        return f"{message[0].lower()}{message[1:]}; is a bracket left open?"
    if not equals or message.startswith(
        ("Couldn't parse", "Malformatted", "Invalid identifier", "Expected '='")
    ):
        return "expected Section.field = value"
    if message == "Expected newline":
        return "expected one setting a line, with a plain value: no arithmetic, nothing after it"
    if message.startswith(("Unable to parse value", "malformed node")):
        message = "expected a plain value (number, string, tuple, True, False, None or %macro)"
    constants = {"true": "True", "false": "False", "none": "None", "null": "None"}
    if value.lower() in constants:
        return f"{message}; write {constants[value.lower()]}"
    if value[:1] in ("'", '"') and value.count(value[0]) % 2:
        return f"{message}; the quote is not closed"
    if value.lower() in ("inf", "nan"):
        return f"{message}; numbers are finite"
    if re.fullmatch(r"[A-Za-z_./~][\w./:~-]*", value):
        return f'{message}; a string needs quotes: "{value}"'
    return message


def bound(bindings: Sequence[Binding], selector: str, field: str) -> Binding | None:
    """The binding that decides ``selector.field``, its macros resolved, or None."""
    found = [b for b in bindings if b.selector == selector and b.field == field]
    if not found:
        return None
    macros = {b.selector: b for b in bindings if not b.field}
    return dataclasses.replace(found[-1], value=_resolve(found[-1].value, macros, found[-1], set()))


def _resolve(
    value: Any, macros: Mapping[str, Binding], binding: Binding, used: set[str], within: tuple[str, ...] = ()
) -> Any:
    """`value`, found in `binding` and in the macros `within`, with macros replaced; adds them to `used`."""
    if isinstance(value, _Macro):
        name = value.name
        if name not in macros:
            raise ConfigError(f"{binding.where}: %{name} is not defined{closest(name, macros)}")
        if name in within:
            circle = " -> ".join(f"%{n}" for n in (*within[within.index(name) :], name))
            raise ConfigError(f"{binding.where}: %{name} is defined by itself: {circle}")
        used.add(name)
        return _resolve(macros[name].value, macros, macros[name], used, (*within, name))
    if isinstance(value, (list, tuple)):
        return type(value)(_resolve(v, macros, binding, used, within) for v in value)
    if isinstance(value, dict):
        return {k: _resolve(v, macros, binding, used, within) for k, v in value.items()}
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


def closest(name: str, names: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the name nearest to `name`, or nothing."""
    by_lower = {n.lower(): n for n in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.55)
    return f" (did you mean {by_lower[found[0]]!r}?)" if found else ""


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
        source = binding.where
        if not source.startswith("--gin_param"):
            source = source.rpartition(":")[0]
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


def import_module(name: str, *, what: str) -> Any:
    """Imports `name`; a module that does not exist is a ConfigError naming `what` asked for it."""
    if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
        raise ConfigError(f"{what}: {name!r} is not a module's name; write package.module, without .py")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"{what}: no module {name!r} on the Python path ({sys.path[0] or 'current directory'})"
            ) from error
        raise
