"""Weights of other projects: their layouts, their files, and how to read a file from a stranger."""
