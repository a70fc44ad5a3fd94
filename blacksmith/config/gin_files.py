"""Gin files as bindings: parsed by Gin's own parser, without its global registry."""

import dataclasses
import importlib
import itertools
import os
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blacksmith.errors import ConfigError, closest, shown
from gin import config_parser

# Far more than a configuration needs, and far less than makes a parser, or a reader of errors, give up.
LONGEST_TEXT = 1 << 15  # bytes of a file or a parameter; the time to parse them grows with the square
LONGEST_STRING = 10_000  # characters
MOST_VALUES = 10_000  # in one value, macros included
DEEPEST = 10  # tuples within tuples, and files that include files

_PACKAGE = Path(__file__).resolve().parent.parent


def gin_directory() -> Path:
    """The directory of the shipped Gin files: inside an installed package, or next to it in a checkout."""
    inside = _PACKAGE / "gin"
    return inside if inside.is_dir() else _PACKAGE.parent / "gin"


def find_file(name: str, *, beside: Path | None = None, where: str = "--gin_file") -> Path:
    """Looks for a Gin file next to the including file, at `name` itself, then among the shipped files."""
    shipped = gin_directory()
    inside = name.removeprefix("gin/")
    for path in (*([beside / name] if beside else []), Path(name), shipped / inside):
        # os.path, since Path.is_file raises for a name too long or a directory that may not be read.
        if os.path.isfile(path):
            return path
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

    Raises `ConfigError` if a file is missing, includes itself, has a syntax error, binds a setting twice,
    uses a scope, or imports code without `allow_imports`.
    """
    bindings: list[Binding] = []
    for name in files:
        path = find_file(name)
        bindings += _parse_file(path, name, where="--gin_file", allow_imports=allow_imports, parents=())
    for text in params:
        if not text.strip():
            raise ConfigError("--gin_param is empty; write --gin_param='Section.field = value'")
        bindings += _parse_text(
            text, f"--gin_param {shown(text)}", None, allow_imports=allow_imports, parents=()
        )
    return bindings


def _parse_file(
    path: Path, display: str, *, where: str, allow_imports: bool, parents: tuple[Path, ...]
) -> Iterator[Binding]:
    real = path.resolve()
    if real in parents:
        raise ConfigError(f"{where}: {display} includes itself")
    if len(parents) > DEEPEST:
        raise ConfigError(f"{where}: {display} is included by more than {DEEPEST} files, one by the other")
    try:
        with path.open("rb") as stream:
            # One byte more, and a byte order mark, so that a longer file is seen to be longer.
            text = stream.read(LONGEST_TEXT + 4).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{display}: cannot be read: {error}") from error
    yield from _parse_text(text, display, path, allow_imports=allow_imports, parents=(*parents, real))


def _parse_text(
    text: str, display: str, path: Path | None, *, allow_imports: bool, parents: tuple[Path, ...]
) -> Iterator[Binding]:
    if len(text.encode(errors="replace")) > LONGEST_TEXT:
        raise ConfigError(f"{display}: more than {LONGEST_TEXT:,} bytes; a Gin file is a few lines of text")
    seen: dict[str, str] = {}
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
                short = statement.filename
                if beside and included == beside / short:
                    short = os.path.normpath(os.path.join(os.path.dirname(display), short))
                yield from _parse_file(
                    included, short, where=where, allow_imports=allow_imports, parents=parents
                )
            case config_parser.BindingStatement():
                key = f"{statement.selector}.{statement.arg_name or ''}".rstrip(".")
                if statement.scope:
                    raise ConfigError(
                        f"{where}: {statement.scope}/{key} has the scope {statement.scope!r}; "
                        f"scopes are not used here, write {key}"
                    )
                if key in seen:
                    raise ConfigError(f"{where}: {key} was already set at {seen[key]}; keep one of the two")
                seen[key] = where
                _check_bounds(statement.value, f"{where}: {key}")
                yield Binding(statement.selector, statement.arg_name or "", statement.value, where)


def _statements(text: str, display: str, *, is_file: bool) -> Iterator[Any]:
    """Gin's statements; every kind of parse error becomes a `ConfigError`."""
    parser = None
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        yield from parser
    except (
        SyntaxError,
        ValueError,
        TypeError,
        RecursionError,
        MemoryError,
        tokenize.TokenError,
    ) as error:
        line = getattr(error, "lineno", None) or (parser.current_token.start[0] if parser else 1)
        where = f"{display}:{line}" if is_file else display
        reason = re.split(r"\.?\s+Got | on line |\n", str(error.args[0] if error.args else error))[0]
        raise ConfigError(
            f"{where}: cannot be parsed ({reason.rstrip('.')}); write one Section.field = value per line; a "
            'value is a number, a string in quotes ("sgd"), a tuple, True, False, None or %macro'
        ) from error


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
    """Replaces the macros in `value`, which is that of `binding` or a part of it; adds their names to `used`.

    `within` has the macros that are being replaced.
    """
    if isinstance(value, Macro):
        name = value.name
        if name not in macros:
            raise ConfigError(f"{binding.where}: %{name} is not defined{closest(name, macros)}")
        if name in within:
            raise ConfigError(f"{binding.where}: %{name} refers to itself")
        used.add(name)
        return resolve_macros(macros[name].value, macros, macros[name], used, (*within, name))
    if isinstance(value, (list, tuple)):
        whole = type(value)(resolve_macros(v, macros, binding, used, within) for v in value)
        # Here, since macros of macros grow without bounds.
        _check_bounds(whole, f"{binding.where}: {binding.selector}.{binding.field}".rstrip("."))
        return whole
    return value


def _check_bounds(value: Any, what: str) -> None:
    """Raises `ConfigError` for a value that is too large, or has characters that no path or text may have."""
    level, count = [value], 0
    for depth in itertools.count():
        count += len(level)
        if depth > DEEPEST or count > MOST_VALUES:
            raise ConfigError(
                f"{what} has more than {DEEPEST} levels or {MOST_VALUES:,} values; a setting needs fewer"
            )
        for item in level:
            if isinstance(item, int) and item.bit_length() > 64:
                raise ConfigError(f"{what} has a whole number of more than 64 bits")
            if isinstance(item, (str, bytes)) and len(item) > LONGEST_STRING:
                raise ConfigError(f"{what} has more than {LONGEST_STRING:,} characters")
            if isinstance(item, str) and re.search("[\0\ud800-\udfff]", item):
                raise ConfigError(f"{what} = {shown(item)} has a character that no text may have")
        level = [part for item in level for part in _parts(item)]
        if not level:
            return


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return itertools.chain(value, value.values())
    return value if isinstance(value, (list, tuple, set)) else ()


def bindings_as_gin(bindings: Sequence[Binding]) -> str:
    """The bindings in order as one Gin file, with a comment before those of each source."""
    lines: list[str] = []
    last = ""
    macros = {b.selector: b for b in bindings if not b.field}
    decided = {(b.selector, b.field): b for b in bindings if b.field}
    for binding in bindings:
        if decided.get((binding.selector, binding.field)) is not binding:
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
