"""Reads what people type: words like `optim.lr=3e-4` or `input=[my texts/]` become values of a schema, or one sentence.

The schema decides how a value is read. The value of a text key is taken as it stands, so that a path may have any
characters; numbers may be written as people write them; lists and maps are in brackets.

    parse_arguments(TrainConfig, ["model=1b", "total_tokens=20B"])     words to choices of conf/ and values
    build(TrainConfig, {"run_dir": "runs/a", ...})                     values to an object, checked
"""
