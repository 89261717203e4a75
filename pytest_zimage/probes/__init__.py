"""Probes: what is observed about machine and process. No module here imports torch; the worker passes it in."""
