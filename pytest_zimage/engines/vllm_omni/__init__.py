"""A vLLM-Omni server as an engine."""
