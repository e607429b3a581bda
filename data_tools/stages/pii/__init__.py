"""Finds personal data and secrets, by kind, and replaces them with placeholders."""
