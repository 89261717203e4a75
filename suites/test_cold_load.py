"""How long a fresh process takes to its first image, with nothing of the variant's files in memory."""


def test_cold_load(zimage):
    """Seconds from an empty page cache to the first image."""
    zimage.gate(zimage.cold_load())
