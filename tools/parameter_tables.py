"""Writes the table of parameters into each experiment's README, from its configuration classes.

    python tools/parameter_tables.py            # rewrites the tables
    python tools/parameter_tables.py --check    # exit status 1 if one is out of date

A table stands between the lines `<!-- parameters: MODULE -->` and `<!-- end of parameters -->`.
"""

import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- parameters: (\S+) -->\n).*?(<!-- end of parameters -->)", re.DOTALL)


def table(config_class: type) -> str:
    """A Markdown table of every setting: name, default, meaning; * where a resume may change it."""
    from blacksmith import config

    lines = ["| parameter | default | meaning |", "| --- | --- | --- |"]
    for section in config.sections(config_class).values():
        for name, field in config.fields(section).items():
            default = "required" if field.is_required() else f"`{field.get_default()!r}`"
            star = " *" if config.may_change(section, name) else ""
            lines.append(f"| `{section.gin_name}.{name}`{star} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def rewritten(text: str) -> str:
    """`text` with every table made anew."""

    def fill(match: re.Match) -> str:
        module = importlib.import_module(match[2])
        return match[1] + "\n" + table(module.Config) + "\n" + match[3]

    return BLOCK.sub(fill, text)


def main() -> int:
    """Rewrites or checks every README below `blacksmith/experiments`."""
    sys.path.insert(0, str(ROOT))
    stale = []
    for path in sorted((ROOT / "blacksmith" / "experiments").rglob("README.md")):
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
