"""What was published about the variants, measured again: the claims of pytest_zimage/catalog/claims.toml.

A claim fails only on the device, engine and workload that it was made with; anywhere else it says what is seen.
"""


def test_claim(zimage_claim):
    """The claim holds between the runs of this session, within its band."""
    zimage_claim.check()
