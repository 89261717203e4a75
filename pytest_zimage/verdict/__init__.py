"""The decision rule: arithmetic on numbers, without I/O and without torch. Importing it imports no numpy or scipy."""
