"""Evaluation of the features."""
