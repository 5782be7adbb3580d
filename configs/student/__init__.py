"""Recipes of students, which learn the inverse of a trained flow in one pass (docs/lab/sampling.md)."""
