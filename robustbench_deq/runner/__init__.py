"""Suites: planned, cut into shards, done anywhere, joined to records, and held against a baseline."""
