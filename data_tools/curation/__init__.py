"""The phases of a curation: where they run, which documents are duplicates, and which documents are kept."""
