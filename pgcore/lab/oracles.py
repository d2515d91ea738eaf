"""Libraries that a chapter compares with, where they are installed."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


def is_installed(library: str, at_least: str = "0") -> bool:
    """True if a library is there, in this version or a later one."""
    try:
        return Version(version(library)) >= Version(at_least)
    except PackageNotFoundError:
        return False
