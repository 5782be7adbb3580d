"""Recipes: what to train, never how."""
