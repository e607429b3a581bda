"""Token shards on disk: their format, and how they are read, written and checked.

The three entry points:

    corpus = Corpus("corpus/manifest.json")          # shards.py: random access to chunks of tokens
    verify_corpus("corpus/manifest.json")            # check.py: every file against the manifest
    CorpusWriter(folder, ...)                        # writer.py: the same bytes for the same documents
"""
