"""Text and where it comes from: generated and real corpora, their preparation, tokenized streams, packed batches.

Where to look, in the order in which text passes through:

* **Sources.** `sources` (one function for each), `tinytown` and the `town_*` behind it, `python_docs`, `text_files`,
  `hub`; `web_dump` (pages with labels), `web_text`.
* **The web.** `crawling` with `canonical_urls`, `robots`, `crawl_fetch`, `crawl_store`; `web_server` and `web_hazards`,
  a site on this machine to try it on; `encoding`, `extraction`, `html_tree`.
* **Choosing.** `language`, `filtering` and `filter_rules`, `quality`, `calibration`, `spam_shift`, `privacy`;
  `detection` scores any of them.
* **Repetition.** `deduplication` (exact), `minhash`, `lsh`, `shingles` (near), `decontamination`.
* **All steps in a row.** `preparation`, made of `document_steps` and `corpus_steps`, judged by `preparation_truth`; the
  same on a cluster: `datatrove_pipeline`.
* **To the model.** `mixing` and `mixture_plan`, `shards`, `shard_stream`, `streaming`, `token_stream`, `packing`.
"""
