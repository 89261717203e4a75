"""Options and ini values: one table, read once into one frozen `Settings`.

Imported by every pytest run on the machine, so it imports next to nothing.
"""

from pytest_zimage.options.settings import (
    Settings,
    add_options,
    given,
    read_settings,
    repeated_options,
    user_cache,
)

__all__ = ["Settings", "add_options", "given", "read_settings", "repeated_options", "user_cache"]
