"""Recipes: the configs of training runs."""
