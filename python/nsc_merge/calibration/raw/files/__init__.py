"""Rows of raw data: of text, tables, datasets; and what is none."""
