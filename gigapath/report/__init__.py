"""`report.html` of a run or a cohort: what is there, what failed, every slide with its tiles and maps, the scores.

collecting and results read what a folder says; pictures, tissue_tiles, overlays and projection make what is looked at;
page puts all of it into one file that needs no network. No torch in here.
"""

from gigapath.report.write import ReportOptions, write_report

__all__ = ["ReportOptions", "write_report"]
