"""Plugin for --external_plugins: a site on which the companion cannot be installed. For tests.

Asking for ms-swift's version raises an error that nobody expects. ms-swift itself does not ask.
"""

import importlib.metadata

version = importlib.metadata.version


def broken(name):
    if name == "ms-swift":
        raise RuntimeError("the metadata of ms-swift cannot be read")
    return version(name)


importlib.metadata.version = broken
