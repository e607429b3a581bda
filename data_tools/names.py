"""Names of the files beside a corpus, and limits that several stages share."""

RECORD_BYTES = 64 << 20
"""Default limit on the decoded bytes of one record: a line, a text, a row or a page."""
REPORT_NAME = "prepare.json"
CARD_NAME = "README.md"
STATISTICS_NAME = "statistics.json"
CROISSANT_NAME = "croissant.json"
PLOTS_FOLDER = "plots"
HELDOUT_FOLDER = "heldout"
HELDOUT_TEXT = "documents.jsonl.gz"
WORK_FOLDER = ".work"
CORPUS_FOLDER = "corpus"  # in the work folder: the corpus before it is moved
