"""The data room: text -> tokenizer -> token files -> batches that depend on samples consumed, not on the layout."""
