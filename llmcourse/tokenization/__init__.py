"""Text to token ids and back: byte-level BPE from scratch, the production tokenizer, the chat template."""
