"""Measurements: run each as `python -m benchmarks.<name>`; the last line on stdout is JSON."""
