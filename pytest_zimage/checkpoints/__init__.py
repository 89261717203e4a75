"""Checkpoints: from files to modules, and the synthetic files that stand in for the official ones."""
