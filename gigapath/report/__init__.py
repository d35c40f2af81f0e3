"""`report.html` of a run or a cohort: what is there, what failed, every slide with its tiles and maps, the scores.

`collecting` reads what a folder says of its slides, `results` scores, `pictures` draws, `write` makes the page, which
needs no network; `study` is the report of a study, `methods` the paragraph of a paper. No torch in here.
"""

from gigapath.report.write import ReportOptions, write_report

__all__ = ["ReportOptions", "write_report"]
