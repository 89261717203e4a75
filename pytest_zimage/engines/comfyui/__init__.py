"""A ComfyUI server as an engine: its workflow, its messages, its cache."""
