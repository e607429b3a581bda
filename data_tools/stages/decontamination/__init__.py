"""Finds the text of evaluation sets in documents, also after edits."""
