"""Measuring: methods over rates and seeds at equal budgets, their tables and pictures, and the command line.

Needs the extra ``examples``; not imported by ``cronos_flax`` itself.
"""
