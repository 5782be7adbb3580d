"""Recipes with a sweep: `python -m launch.sweep --config=configs/sweeps/NAME.py --workdir=DIR`; docs/results.md."""
