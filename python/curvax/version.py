"""The installed version of the package."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("curvax")
except importlib.metadata.PackageNotFoundError:
    __version__ = "unknown"  # sources that were never installed
