"""Modules that take seconds to import, imported by the first test that uses them."""

import importlib


class Lazy:
    """Stands for a module until one of its attributes is used."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if attribute.startswith("_") or attribute == "pytestmark":  # which pytest asks all objects of a module for
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)
