"""Recipes of students, which learn to invert a trained flow in one pass (docs/lab/sampling.md)."""
