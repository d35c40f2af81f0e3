"""`gigapath check`: what is wrong with files of tile and slide embeddings, ours and other tools', in words."""

from gigapath.check.findings import FileReport, FolderReport
from gigapath.check.run import CheckOptions, check_paths
from gigapath.findings import Finding

__all__ = ["CheckOptions", "FileReport", "Finding", "FolderReport", "check_paths"]
