"""Text and where it comes from: generated and real corpora, tokenized streams, packed batches."""
