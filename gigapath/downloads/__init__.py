"""What the project fetches, from where, and how it is checked. No torch in here."""

from gigapath.downloads.collect import Collected, download
from gigapath.downloads.hub import HUB_PREFIXES, hub_file
from gigapath.downloads.table import DOWNLOADS, RELEASES, Download, Release, RemoteFile, release_of

__all__ = [
    "DOWNLOADS",
    "HUB_PREFIXES",
    "RELEASES",
    "Collected",
    "Download",
    "Release",
    "RemoteFile",
    "download",
    "hub_file",
    "release_of",
]
