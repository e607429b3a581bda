"""Measurements of this program, and of others beside it. The product imports nothing from here."""
