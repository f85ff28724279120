"""Reporting: tables, plots and pages, all of them pure functions of records."""
