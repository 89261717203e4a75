"""How long one image takes once the variant is loaded."""


def test_warm_latency(zimage):
    """Seconds per image once the variant is warm."""
    zimage.gate(zimage.warm_latency())


def test_forwards(zimage):
    """One transformer forward a step: a guidance pass or a wasted step would double or stretch an image."""
    zimage.gate(zimage.forwards())
