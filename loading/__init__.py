"""Load weights and a tokenizer from a folder or the Hugging Face Hub."""
