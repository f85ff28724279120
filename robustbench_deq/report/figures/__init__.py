"""Figures of records and of training runs, drawn with matplotlib."""
