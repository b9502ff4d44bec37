"""A file for each model family: how its `config.json` is read, and the table of its tensors."""
