"""Benchmarks of fastbert: each prints a table and writes what it measured to ``benchmarks/results/``."""
