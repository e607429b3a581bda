"""Names of the files beside a corpus, and limits shared by several stages."""

RECORD_BYTES = 64 << 20
"""Default limit on the decoded size of one record (line, text, row, page or sample of a tar), in bytes."""
REPORT_NAME = "prepare.json"
CARD_NAME = "README.md"
STATISTICS_NAME = "statistics.json"
CROISSANT_NAME = "croissant.json"
PLOTS_FOLDER = "plots"
HELDOUT_FOLDER = "heldout"
HELDOUT_TEXT = "documents.jsonl.gz"
WORK_FOLDER = ".work"
CORPUS_FOLDER = "corpus"  # inside the work folder, until the finished corpus is moved into place
