"""Stages of curation: one document goes in, and is kept, changed, or dropped with a reason."""
