"""Which kernels ran: the operations of one image and the backends that served them."""


def test_dispatch(zimage):
    """Every operation is served by the backend recorded, as often as recorded: `rms_rope: cuda`, 240 calls."""
    zimage.gate(zimage.dispatch())


def test_quantised_layers(zimage):
    """No layer that computes quantised dequantised instead, which images do not show and the clock does."""
    zimage.gate(zimage.quantised_layers())
