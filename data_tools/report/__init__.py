"""Describes a corpus: its statistics, funnel, card, plots and Croissant file, and the schemas of these files."""
