"""Strict Gin configuration: Gin files, the sections they bind, and the sections that experiments share."""

from blacksmith.config.conditions import in_words
from blacksmith.config.gin_files import Binding, bindings_as_gin, bound, gin_directory, parse
from blacksmith.config.sections import (
    as_dict,
    as_gin,
    build,
    changes,
    fields,
    locations,
    may_change,
    section,
    sections,
    setting,
)

__all__ = [
    "Binding",
    "as_dict",
    "as_gin",
    "bindings_as_gin",
    "bound",
    "build",
    "changes",
    "fields",
    "gin_directory",
    "in_words",
    "locations",
    "may_change",
    "parse",
    "section",
    "sections",
    "setting",
]
