"""Weights of other projects: their layouts, their files, and safe reading of untrusted files."""
