"""Datasets as NumPy arrays: one package per dataset, no framework and no experiment config.

Every dataset takes its source by name, checks what it reads, and records in `info` what was used, with a hash
of the content.
"""
