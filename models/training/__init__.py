"""Train the bundled pair: corpus, tokenizer, target, drafter, n-gram model.

`make train-pair` runs every stage in order (see `models.training.__main__`). Needs the `train` extra.
"""
