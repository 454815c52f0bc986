"""Rows: read, checked, encoded once, and dealt into micro-batches."""
