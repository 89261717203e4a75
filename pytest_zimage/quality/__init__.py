"""Image quality: a judge in a child process of its own, and the arithmetic on what it says."""
