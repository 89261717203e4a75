"""Synthetic model sets: random weights in exactly the on-disk formats of the official files, at any dimensions.

The test process calls `ensure_model_set`, which is torch-free; a child process writes the files.
"""

from pytest_zimage.checkpoints.synthetic.ensure import SET_NAMES, ensure_model_set, set_dims
from pytest_zimage.checkpoints.synthetic.manifest import MANIFEST, Manifest, read_manifest, writer_hash

__all__ = ["MANIFEST", "SET_NAMES", "Manifest", "ensure_model_set", "read_manifest", "set_dims", "writer_hash"]
