"""Whether two engines agree: runs where another one is named, `--zimage-parity ENGINE`."""


def test_same_picture(zimage):
    """The same weights, prompt, seed and sampler give the same picture through another engine."""
    zimage.gate(zimage.parity())
