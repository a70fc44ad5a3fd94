"""Strict Gin configuration: Gin files, the sections they bind, and the sections that experiments share."""

from blacksmith.config.conditions import NOT_NONE, POSITIVE, Is, in_words
from blacksmith.config.gin_files import Binding, bindings_as_gin, bound, find_file, gin_directory, parse
from blacksmith.config.sections import (
    as_dict,
    as_gin,
    build,
    changes,
    config_hash,
    fields,
    forbidden_changes,
    may_change,
    section,
    sections,
    setting,
)

__all__ = [
    "NOT_NONE",
    "POSITIVE",
    "Binding",
    "Is",
    "as_dict",
    "as_gin",
    "bindings_as_gin",
    "bound",
    "build",
    "changes",
    "config_hash",
    "fields",
    "find_file",
    "forbidden_changes",
    "gin_directory",
    "in_words",
    "may_change",
    "parse",
    "section",
    "sections",
    "setting",
]
