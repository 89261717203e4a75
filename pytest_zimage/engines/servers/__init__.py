"""What engines that drive a server have in common: its process, its memory, requests that may fail, one run of it."""
