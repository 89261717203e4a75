"""Reports: what a person reads. Text in, text out; nothing here imports torch."""
