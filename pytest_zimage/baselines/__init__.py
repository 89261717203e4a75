"""Baselines: what a file may hold, where it lives, and how it may change."""
