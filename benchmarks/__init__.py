"""Benchmarks; each module is a command of its own and prints one table."""
