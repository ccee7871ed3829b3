"""A folder, or a name of the hub, to weights and a tokenizer."""
