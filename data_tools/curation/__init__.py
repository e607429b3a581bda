"""The phases of a curation over all documents: on which executor they run, what is a duplicate, and what is kept."""
