"""Gin files as bindings: parsed by Gin's own parser, without its global registry.

An error is one line with the file and line number, what is allowed and the closest match.
"""

import dataclasses
import importlib
import os
import re
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blacksmith.errors import ConfigError, closest
from gin import config_parser

_PACKAGE = Path(__file__).resolve().parent.parent


def gin_directory() -> Path:
    """The directory of the shipped Gin files: inside an installed package, or next to it in a checkout."""
    inside = _PACKAGE / "gin"
    return inside if inside.is_dir() else _PACKAGE.parent / "gin"


def find_file(name: str, *, beside: Path | None = None, where: str = "--gin_file") -> Path:
    """The Gin file called `name`.

    Looks next to the including file, at `name` itself, then among the shipped files (with or without a
    leading ``gin/``).

    Raises:
      ConfigError: there is no such file; suggests the closest shipped one.
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
class Macro:
    name: str


class _Delegate(config_parser.ParserDelegate):
    """Keeps macros as names and refuses references."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        raise ValueError(f"'@{scoped_configurable_name}' is a reference")

    def macro(self, macro_name: str) -> Any:
        return Macro(macro_name)


def parse(files: Sequence[str], params: Sequence[str] = (), *, allow_imports: bool = False) -> list[Binding]:
    """Reads Gin files, then ``--gin_param`` bindings; a later binding overrides an earlier one.

    Args:
      files: names as given by the user, see `find_file`.
      params: single bindings such as ``'mnist.Train.epochs = 3'``.
      allow_imports: whether ``import`` statements may run code.

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
    """Gin's statements; every kind of parse error becomes a `ConfigError`."""
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
    """What is wrong with the line `source`, for someone who writes settings."""
    key, _, value = (part.strip() for part in source.partition("#")[0].partition("="))
    reason = re.split(r"\.?\s+Got | on line |\n", str(error.args[0] if error.args else error))[0].rstrip(".")
    constants = {"true": "True", "false": "False", "none": "None", "null": "None"}
    constants |= {"inf": "a finite number", "nan": "a finite number"}
    if isinstance(error, tokenize.TokenError) or (value[:1] in ("'", '"') and value.count(value[0]) % 2):
        return "a bracket or a quote is never closed"
    if reason.startswith("Expected ','"):
        return f"expected{reason[8:]}; a comma or a closing bracket is missing"
    if key.partition(" ")[0] in ("include", "import", "from"):
        return 'expected include "file.gin" or import package.module'
    if value.lower() in constants:
        return f"write {constants[value.lower()]} instead of {value}"
    if re.fullmatch(r"[A-Za-z_./~][\w./:~-]*", value):
        return f'a string needs quotes: "{value}"'
    return (
        f"expected one Section.field = value per line ({reason}); a value is a number, string, tuple, True, "
        "False, None or %macro"
    )


def bound(bindings: Sequence[Binding], selector: str, field: str) -> Binding | None:
    """The last binding of ``selector.field`` with its macros resolved, or None."""
    found = [b for b in bindings if b.selector == selector and b.field == field]
    if not found:
        return None
    macros = {b.selector: b for b in bindings if not b.field}
    return dataclasses.replace(found[-1], value=resolve_macros(found[-1].value, macros, found[-1], set()))


def resolve_macros(
    value: Any, macros: Mapping[str, Binding], binding: Binding, used: set[str], within: tuple[str, ...] = ()
) -> Any:
    """`value` with its macros replaced; adds their names to `used`.

    Args:
      value: the value of `binding`, or a part of it.
      macros: all macros by name.
      binding: where `value` stands, for messages.
      used: collects the names of the macros that were replaced.
      within: the macros being replaced, to detect one that refers to itself.
    """
    if isinstance(value, Macro):
        name = value.name
        if name not in macros:
            raise ConfigError(f"{binding.where}: %{name} is not defined{closest(name, macros)}")
        if name in within:
            circle = " -> ".join(f"%{n}" for n in (*within[within.index(name) :], name))
            raise ConfigError(f"{binding.where}: %{name} refers to itself: {circle}")
        used.add(name)
        return resolve_macros(macros[name].value, macros, macros[name], used, (*within, name))
    if isinstance(value, (list, tuple)):
        return type(value)(resolve_macros(v, macros, binding, used, within) for v in value)
    if isinstance(value, dict):
        return {k: resolve_macros(v, macros, binding, used, within) for k, v in value.items()}
    return value


def bindings_as_gin(bindings: Sequence[Binding]) -> str:
    """The bindings in order as one Gin file, with a comment before those of each source."""
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
        value = resolve_macros(binding.value, macros, binding, set())
        lines.append(f"{binding.selector}.{binding.field} = {value!r}")
    return "\n".join(lines).strip() + "\n"
