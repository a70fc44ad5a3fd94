"""Experiments, by framework and then by task; nothing else in the package imports one."""
