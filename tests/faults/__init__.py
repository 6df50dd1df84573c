"""Faults on purpose: kills, full disks, damaged files, NaN, exceptions, second writers, by number from a seed.

``python -m tests.faults --faults 1000 --out rows.jsonl`` runs all of them; docs/benchmarks/faults.md has the table.
"""
