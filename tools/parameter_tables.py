"""Writes the tables of parameters into docs/settings.md and the READMEs of the experiments.

    python tools/parameter_tables.py            # rewrites the tables
    python tools/parameter_tables.py --check    # exit status 1 if one is out of date

A table is written between the lines `<!-- parameters: MODULE -->` and `<!-- end of parameters -->`. For
`blacksmith.config.settings` it lists the shared sections, for an experiment's `configs` module its own
sections and its changes to shared ones.
"""

import importlib
import re
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "docs" / "settings.md", *(ROOT / "blacksmith" / "experiments").rglob("README.md")]
BLOCK = re.compile(r"(<!-- parameters: (\S+) -->\n).*?(<!-- end of parameters -->)", re.DOTALL)


def tables(module: str) -> str:
    """One Markdown table for each section of a module."""
    from blacksmith import config
    from blacksmith.config import settings

    found = importlib.import_module(module)
    if found is settings:
        parents = {
            cls: next((c for c in cls.__mro__[1:] if c in settings.SHARED), None) for cls in settings.SHARED
        }
        parts = [(cls, rows(cls, parent)) for cls, parent in parents.items()]
    else:
        parts = [
            (cls, rows(cls, next((c for c in cls.__mro__ if c in settings.SHARED), None)))
            for cls in config.sections(found.Config).values()
        ]
    header = "| parameter | default | meaning |\n| --- | --- | --- |"
    blocks = [f"{title(cls)}\n\n{header}\n" + "\n".join(lines) for cls, lines in parts if lines]
    return "\n\n".join(blocks) + "\n"


def title(cls: type) -> str:
    """The section's name, the first line of its docstring, and the condition for it to apply."""
    from blacksmith import config

    line = f"**{cls.gin_name}**: " + cls.__doc__.strip().partition("\n")[0]
    return f"{line} Only if {config.in_words(cls.gin_only_with)}." if cls.gin_only_with else line


def rows(cls: type, shared: type | None) -> list[str]:
    """One row per setting, without those that equal the setting in `shared`."""
    from blacksmith import config

    lines = []
    for name, field in config.fields(cls).items():
        same = shared and config.fields(shared).get(name)
        if same and (same.annotation, same.default, same.description, same.json_schema_extra) == (
            field.annotation,
            field.default,
            field.description,
            field.json_schema_extra,
        ):
            continue
        default = "required" if field.is_required() else f"`{field.get_default()!r}`"
        star = " *" if config.may_change(cls, name) else ""
        choices = (
            typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
        )
        meaning = field.description
        if any(choice not in meaning for choice in choices):
            meaning += f"; one of {', '.join(choices)}"
        if own := field.json_schema_extra["only_with"]:
            meaning += f"; only if {config.in_words(own)}"
        lines.append(f"| `{cls.gin_name}.{name}`{star} | {default} | {meaning} |")
    lines += [f"| `{cls.gin_name}.{name}` | | not used: {why} |" for name, why in cls.gin_unused.items()]
    return lines


def rewritten(text: str) -> str:
    """`text` with all tables updated."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{tables(match[2])}\n{match[3]}", text)


def main() -> int:
    """Rewrites or checks all pages."""
    sys.path.insert(0, str(ROOT))
    stale = []
    for path in sorted(PAGES):
        before = path.read_text(encoding="utf-8")
        after = rewritten(before)
        if after != before:
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(path.relative_to(ROOT))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
