"""From run records to tables, figures and one page: per client first, everything else derived from that."""

from fedmerge.report.attendance import attendance_table
from fedmerge.report.page import write_report
from fedmerge.report.privacy import Privacy, privacy
from fedmerge.report.privacy_page import write_privacy
from fedmerge.report.privacy_text import privacy_table
from fedmerge.report.table import Column, Table
from fedmerge.report.tables import clients_frame, comparison_table, runs_frame
from fedmerge.report.task_table import task_table

__all__ = [
    "Column",
    "Privacy",
    "Table",
    "attendance_table",
    "clients_frame",
    "comparison_table",
    "privacy",
    "privacy_table",
    "runs_frame",
    "task_table",
    "write_privacy",
    "write_report",
]
