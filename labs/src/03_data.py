# %% [markdown]
# # Lab 03 · Data preparation
#
# [Open in Colab]({{colab}}) · [Source of this lab]({{repository}}/blob/{{branch}}/labs/src/03_data.py)
#
# | | |
# |---|---|
# | **Chapter** | [03 Data preparation](../book/pretraining/data.md) |
# | **Hardware** | CPU, 2 cores, 2 GiB of memory, no network |
# | **Minutes** | 2 to execute; 5 hours with the exercises |
# | **You will build** | canonical addresses, the score of an extraction, a repetition rule, the calibration error, a mask for addresses, MinHash signatures and their bands, a contamination check, a merge of byte-pair encoding, mixture weights, packed rows |
# | **What to inspect** | the funnel with precision and recall of every step; what each step drops; the measured S-curve; the price of dirty text in nats; a tokenizer on text it has not seen; three ways to fool yourself |

# %% [markdown]
# ## Setup
#
# `CORPUS` is the real text beside the generated town in sections 3 and 5 (`"python-docs"`, `"files:*.txt"`, `"hub:<name>"`). The pages, whose truth is known, are always Tinytown's. Every random number follows from `SEED`.

# %% tags=["parameters"]
PRESET = "cpu"
CORPUS = "python-docs"
SEED = 0

# %%
import json
import math
import random
import statistics
import tempfile
import time
import warnings
from collections import Counter
from functools import reduce
from itertools import pairwise
from operator import add
from pathlib import Path

import numpy as np
import torch

from llmcourse import plotting
from llmcourse.checks import check, claim
from llmcourse.data import shingles
from llmcourse.data.calibration import reliability
from llmcourse.data.crawling import OUTCOMES, CrawlSettings, address_outcomes, crawl, read_crawl
from llmcourse.data.decontamination import Decontaminator
from llmcourse.data.deduplication import LineSettings, deduplicate_lines, first_occurrences
from llmcourse.data.encoding import repair
from llmcourse.data.extraction import extract, score_extraction, strip_tags
from llmcourse.data.filtering import c4, filter_texts, fineweb, gopher
from llmcourse.data.filtering import tinytown as town_rules
from llmcourse.data.language import accuracy_by_letters
from llmcourse.data.lsh import choose_bands, probability
from llmcourse.data.minhash import MinHashSettings, estimate_jaccard, near_duplicates, signatures
from llmcourse.data.mixing import MixedStream, MixtureSettings
from llmcourse.data.mixture_plan import plan_mixture
from llmcourse.data.packing import PackedBatches, tokenize, whole_document_batches
from llmcourse.data.preparation import PreparationSettings, prepare
from llmcourse.data.quality import train_quality
from llmcourse.data.shard_stream import ShardStream, StreamSettings
from llmcourse.data.shards import open_shards, write_shards
from llmcourse.data.sources import load_corpus
from llmcourse.data.spam_shift import quiet_spam
from llmcourse.data.streaming import ListSource, StreamedBatches
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import WebPage, WebSettings, web_dump
from llmcourse.data.web_server import SiteSettings, serve
from llmcourse.data.web_text import near_copy
from llmcourse.evaluation.perplexity import token_loss, token_losses
from llmcourse.evaluation.statistics import bootstrap_interval, seed_interval, wilson_interval
from llmcourse.labs import store_results
from llmcourse.models import ModelConfig, Transformer
from llmcourse.runtime import pick_device, progress, set_seed
from llmcourse.tokenization.bpe import train_bpe
from llmcourse.tokenization.tokenizer import SPECIAL_TOKENS, Tokenizer
from llmcourse.training.fit import FitSettings, fit
from llmcourse.training.pretraining import next_token_loss

SIZES = {
    "cpu": {"crawl": 200, "pages": 2000, "labelled": 1500, "pairs": 4000, "steps": 100, "n_seeds": 3, "width": 64},
    "gpu": {"crawl": 2000, "pages": 40_000, "labelled": 6000, "pairs": 40_000, "steps": 1500, "n_seeds": 5, "width": 256},
}  # fmt: skip
if PRESET not in SIZES:
    raise ValueError(f"PRESET={PRESET!r}: choose one of {', '.join(SIZES)}")
sizes = SIZES[PRESET]
seeds = range(SEED, SEED + sizes["n_seeds"])
device = pick_device("auto" if PRESET == "gpu" else "cpu")
if PRESET == "cpu":
    # The matrices of section 4 are too small to share, and waiting for a busy core costs more.
    torch.set_num_threads(1)
town = Town(seed=SEED)
results = {"preset": PRESET, "corpus": CORPUS, "seed": SEED}


def share(successes, n):
    """A share with its Wilson interval as plain data; None where nothing was to be found."""
    if n == 0:
        return None
    found = wilson_interval(successes, n)
    return {"value": found.value, "low": found.low, "high": found.high, "n": n}


def shown(estimate):
    """A share in a table."""
    return (
        "-"
        if estimate is None
        else f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    )


# %% [markdown]
# ## Objectives
#
# After this lab you can
#
# 1. crawl a site so that its owner has no reason to complain, and prove it from the server's log;
# 2. measure each step of data preparation by precision and recall, with intervals, and read what it drops;
# 3. choose bands and rows of a near-duplicate search by what a miss and a false pair cost, and check the curve;
# 4. say what a clean corpus is worth in nats, with its spread over seeds;
# 5. train a tokenizer and measure what it costs on other text;
# 6. mix, pack and stream documents so that a run resumes at the same token.

# %% [markdown]
# ## 1. Fetch and extract
#
# **Why.** The web dump writes Tinytown's documents into pages with menus, banners and footers, duplicates some, garbles others, and keeps the truth about each. A server on this machine serves them with everything that makes crawling hard: redirect loops, endless pages, a calendar without end, wrong character sets, a disallowed folder.
#
# **Exercise 1.** A crawler must know when two addresses are one page. Return the canonical form: scheme and host in lower case, no default port, `.` and `..` resolved, an empty path as `/`, no fragment, no tracking parameters (`utm_*`, `gclid`, `fbclid`), the other parameters sorted.
#
# <details><summary>Hint</summary>
#
# `urllib.parse.urlsplit(url)` has `.scheme`, `.hostname` (in lower case), `.port` and `.query`; `urljoin(url, path)` resolves dots. Everything after the host keeps its case.
#
# </details>


# %% exercise="canonical_url"
def my_canonical_url(url):
    """'HTTP://A.example:80/x/../B?utm_source=m&b=2&a=1#top' -> 'http://a.example/B?a=1&b=2'."""
    raise NotImplementedError


# %% check="canonical_url"
check("data/canonical_url", my_canonical_url)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# from urllib.parse import urljoin, urlsplit
#
#
# def my_canonical_url(url):
#     parts = urlsplit(url)
#     default = {"http": 80, "https": 443}[parts.scheme]
#     host = parts.hostname if parts.port in (None, default) else f"{parts.hostname}:{parts.port}"
#     path = urlsplit(urljoin(url, parts.path or "/")).path
#     tracking = ("utm_", "gclid=", "fbclid=")
#     query = "&".join(sorted(p for p in parts.query.split("&") if p and not p.startswith(tracking)))
#     return f"{parts.scheme}://{host}{path}" + (f"?{query}" if query else "")
# ```
#
# </details>
#
# **Predict.** The crawler waits 5 ms between requests here (a second would be polite elsewhere). The site has a folder that `robots.txt` forbids, a page that sends bytes for ever, two addresses that redirect to each other. How many requests inside the forbidden folder will the server's log show? How will each of the hazards be counted?

# %%
pages = list(web_dump(town, sizes["crawl"], seed=SEED))
site_settings = SiteSettings(disallow=("/private/", "/board/"), crawl_delay=0.005)
polite = CrawlSettings(
    delay=0.005, timeout=0.5, max_seconds=0.6, max_bytes=200_000, backoff=0.02, retries=2, max_pages_per_folder=400,
)  # fmt: skip
with tempfile.TemporaryDirectory() as folder, serve(pages, settings=site_settings) as site:
    first = crawl(
        [site.url], folder, CrawlSettings(**vars(polite) | {"max_pages": 60})
    )  # stopped early, then resumed
    report = crawl([site.url], folder, polite)
    outcomes, fetched = address_outcomes(folder), list(read_crawl(folder))
    truth = {url: resource for url, resource in site.truth.items() if resource.outcome is not None}
    labels = {url: page.labels for url, page in site.pages.items()}
    log = list(site.log)
times = [request.time for request in log]
right = sum(outcomes.get(url) == resource.outcome for url, resource in truth.items())
forbidden = sum(request.path.startswith(site_settings.disallow) for request in log)
requests_of = Counter(site.url.rstrip("/") + request.path for request in log if request.status == 200)
refetched = sum(n > 1 for url, n in requests_of.items() if outcomes.get(url) == "fetched")
gap = min(b - a for a, b in pairwise(times))
print(
    f"{first.outcomes['fetched']} pages, a stop, then {report.outcomes['fetched']} in all: {len(log)} requests, none closer than {1e3 * gap:.1f} ms"
)
print(
    f"{right} of {len(truth)} addresses ended as they should; {forbidden} requests inside the forbidden folders; {refetched} pages fetched twice\n"
)
for outcome, n in report.outcomes.items():
    print(f"{n:>5} {outcome:<13} {OUTCOMES[outcome]}")
print(f"links: {report.links}")
results["crawl"] = {
    "outcomes": report.outcomes, "requests": len(log), "right": right, "addresses": len(truth), "forbidden": forbidden,
    "refetched": refetched, "gap_ms": 1e3 * gap, "respelled": report.links.get("respelled", 0),
}  # fmt: skip

# %% [markdown]
# **Read the result.** `respelled` counts links that were written in another way and led to no second request: your exercise at work. The crawl was stopped in the middle and went on from its state on disk. An address has exactly one outcome, so the column adds up to all addresses known.
#
# **Exercise 2.** From HTML to text: how well? Score the words of an extracted text against the true text as *multisets*.
#
# <details><summary>Hint</summary>
#
# `Counter(a.split()) & Counter(b.split())` keeps the smaller count of each word.
#
# </details>


# %% exercise="word_scores"
def my_word_scores(extracted, truth):
    """Two texts -> {"precision": ..., "recall": ..., "f1": ...}."""
    raise NotImplementedError


# %% check="word_scores"
check("data/word_scores", my_word_scores)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_word_scores(extracted, truth):
#     found, wanted = Counter(extracted.split()), Counter(truth.split())
#     shared = (found & wanted).total()
#     precision, recall = shared / found.total(), shared / wanted.total()
#     return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}
# ```
#
# </details>
#
# **Run: every visible word, against the main text.** `strip_tags` keeps what a page shows; `extract` asks trafilatura for the main text. The truth is what the author wrote before somebody garbled it, so the repaired text is scored.

# %%
known = [page for page in fetched if page.url in labels]
results["extraction"] = {}
print(
    f"{'':>12}  words: precision  recall     F1   lines: F1   exact pages (95 % interval), {len(known)} pages"
)
for name, method in (
    ("all visible", lambda page: strip_tags(page.body, page.content_type)),
    ("main text", lambda page: extract(page.body, url=page.url, content_type=page.content_type).text),
):
    found = reduce(
        add, (score_extraction(repair(method(page)).text, labels[page.url]["text"]) for page in known)
    )
    exact = share(found.exact, found.pages)
    row = {"precision": found.words.precision, "recall": found.words.recall, "f1": found.words.f1}
    results["extraction"][name] = row | {"lines_f1": found.lines.f1, "exact": exact}
    print(
        f"{name:>12} {row['precision']:>17.3f} {row['recall']:>7.3f} {row['f1']:>6.3f} {found.lines.f1:>11.3f}   {shown(exact)}"
    )

# %% [markdown]
# **Read the result.** Keeping everything loses nothing, and more than a quarter of the words are menus and notices. The lines column is the stricter one: it asks whether each line came out as it was written, which is what a list of sums needs.

# %% [markdown]
# ## 2. Filters, a classifier, and personal data
#
# **Why.** The three published sets of rules were chosen on long English web pages. What do they make of other text? The labels say which pages are spam.
#
# **Exercise 3.** One of Gopher's rules for repetition: the fraction of a text's characters in the most frequent n-gram of words, all its occurrences together, the spaces inside included. 0 if no n-gram occurs twice.


# %% exercise="repetition"
def my_top_ngram_fraction(text, n):
    """Characters of the most frequent n-gram, times its occurrences, over len(text)."""
    raise NotImplementedError


# %% check="repetition"
check("data/repetition", my_top_ngram_fraction)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_top_ngram_fraction(text, n):
#     words = text.split()
#     counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
#     if not counts or max(counts.values()) < 2:
#         return 0.0
#     ngram, count = counts.most_common(1)[0]
#     return count * len(" ".join(ngram)) / len(text)
# ```
#
# </details>
#
# **Predict.** Which published set has the highest recall for spam here, and which the highest precision?

# %%
labelled = list(web_dump(town, sizes["labelled"], seed=SEED + 1))
distinct = {
    page.labels["text"]: page.labels["kind"] == "spam" for page in labelled if page.labels["language"] == "en"
}
texts, is_spam = list(distinct), list(distinct.values())
results["rules"] = {}
print(f"{len(texts)} English texts, {sum(is_spam)} of them spam")
for name, rules in (
    ("Gopher", gopher()),
    ("C4", c4()),
    ("FineWeb", fineweb()),
    ("for the town", town_rules()),
):
    judged = filter_texts(texts, rules)
    hits = sum(d and s for d, s in zip(judged.dropped, is_spam, strict=True))
    precision, recall = share(hits, sum(judged.dropped)), share(hits, sum(is_spam))
    good_lost = share(sum(judged.dropped) - hits, len(texts) - sum(is_spam))
    results["rules"][name] = {
        "precision": precision,
        "recall": recall,
        "good_lost": good_lost,
        "violations": dict(judged.violations.most_common(4)),
    }
    print(
        f"{name:>12}: precision {shown(precision)}, recall {shown(recall)}, good text lost {good_lost['value']:.1%}; {dict(judged.violations.most_common(2))}"
    )

# %% [markdown]
# **Read the result.** On this text the published rules mostly find that it is short, or made of numbers. The last line has bounds that were chosen on another dump of this town, which is what a bound is worth: as much as the sample it was chosen on resembles what it is applied to.
#
# **A classifier** learns the difference from labels. **Exercise 4.** Its scores are to be read as probabilities, so they must be calibrated. Write the expected calibration error: bins of equal width, the share of positives against the mean probability in each, weighted by their size.
#
# <details><summary>Hint</summary>
#
# The bin of p is `min(int(p * n_bins), n_bins - 1)`, so that p = 1 has one too. Empty bins count nothing.
#
# </details>


# %% exercise="calibration"
def my_calibration_error(probabilities, labels, n_bins=10):
    """(M,) probabilities, (M,) bool -> number from 0 to 1."""
    raise NotImplementedError


# %% check="calibration"
check("data/calibration", my_calibration_error)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_calibration_error(probabilities, labels, n_bins=10):
#     p, y = np.asarray(probabilities, float), np.asarray(labels, float)
#     bins = np.minimum((p * n_bins).astype(int), n_bins - 1)
#     gaps = [(bins == b).sum() * abs(y[bins == b].mean() - p[bins == b].mean()) for b in np.unique(bins)]
#     return sum(gaps) / len(p)
# ```
#
# </details>
#
# **Run.** Three questions to one kind of classifier. Trained on the dump's loud spam: does it find loud spam of another dump? Does it find quiet spam, advertisements in plain prose, which it has never seen? And if a tenth of the training spam is quiet?

# %%
quiet = random.Random(SEED)
loud_spam = [text for text, spam in distinct.items() if spam]
quiet_train = [quiet_spam(quiet, 5) for _ in range(60)]
quiet_test = [quiet_spam(quiet, 5) for _ in range(200)]
other = {
    p.labels["text"]: p.labels["kind"] == "spam"
    for p in web_dump(town, sizes["labelled"], seed=SEED + 2)
    if p.labels["language"] == "en"
}
other = {text: spam for text, spam in other.items() if text not in distinct}
narrow = train_quality(texts, [not spam for spam in is_spam])
both = [*texts, *quiet_train]
classifier = train_quality(both, [*(not spam for spam in is_spam), *[False] * len(quiet_train)])
test_texts, test_good = (
    [*other, *quiet_test],
    np.array([*(not spam for spam in other.values()), *[False] * len(quiet_test)]),
)
n_loud = sum(other.values())
results["classifier"] = {}
for name, model in (("loud spam only", narrow), ("loud and quiet", classifier)):
    dropped = ~np.array(model.keep(test_texts))
    loud = sum(d and s for d, s in zip(dropped[: len(other)], other.values(), strict=True))
    found = {
        "loud_recall": share(int(loud), n_loud), "quiet_recall": share(int(dropped[len(other):].sum()), len(quiet_test)),
        "good_lost": share(int((dropped & test_good).sum()), int(test_good.sum())),
        "threshold": model.threshold, "calibration_error": reliability(model.probabilities(test_texts), test_good).error,
    }  # fmt: skip
    results["classifier"][name] = found
    print(
        f"trained on {name:>14}: finds loud {shown(found['loud_recall'])}, quiet {shown(found['quiet_recall'])}, good text lost {shown(found['good_lost'])}"
    )
    print(f"{'':>25}  threshold {model.threshold:.3f}, calibration error {found['calibration_error']:.3f}")

# %% [markdown]
# On whole pages the classes are so far apart that hardly any probability lies in between. On snippets of two words they do: does a 0.6 mean six in ten? The regression was fitted with both classes counting alike, so its own probabilities are those of another mixture; Platt's sigmoid, fitted on texts held back, brings them to this one.


# %%
def snippets(texts, good, seed):
    """Two random runs of two words from each text, with its label."""
    rng, cut, labels = random.Random(seed), [], []
    for text, is_good in zip(texts, good, strict=True):
        words = text.split()
        for _ in range(2):
            start = rng.randrange(max(1, len(words) - 1))
            cut.append(" ".join(words[start : start + 2]))
            labels.append(bool(is_good))
    return cut, np.array(labels)


short_texts, short_good = snippets(
    [*texts, *quiet_train], [*(not spam for spam in is_spam), *[False] * len(quiet_train)], SEED
)
probe_texts, probe_good = snippets(test_texts, test_good, SEED + 1)
short_model = train_quality(short_texts, short_good.tolist(), precision=0.9)
curves = {
    "regression alone": reliability(1 / (1 + np.exp(-short_model.scores(probe_texts))), probe_good),
    "after Platt's sigmoid": reliability(short_model.probabilities(probe_texts), probe_good),
}
figure = plotting.lines(
    {"perfect": ([0, 1], [0, 1])} | {name: (c.predicted, c.observed) for name, c in curves.items()}, markers=True,
    xlabel="predicted probability of being good", ylabel="share of good snippets", title="Snippets of two words from a dump it has not seen",
)  # fmt: skip
plotting.show(
    figure,
    alt="Reliability curves over ten bins: the regression's own probabilities and those after Platt's sigmoid, beside the diagonal.",
)
for name, c in curves.items():
    print(f"{name:>21}: calibration error {c.error:.3f}; bins of {c.counts}")
results["calibration"] = {
    name: {"error": c.error, "predicted": c.predicted, "observed": c.observed, "counts": c.counts}
    for name, c in curves.items()
}

# %% [markdown]
# **Read the result.** A classifier recognizes the rubbish that it was shown. Its excellent score on the first kind says nothing about the second, and its probabilities are wrong there as well: compare the calibration errors of the two on pages that contain quiet spam. Calibration is a statement about one population. In the middle of the last figure the bins hold few snippets each; read the error, which weighs them, before the zigzag.
#
# **Language.** Short texts are where identification fails, and a page of sums has no language at all.

# %%
by_length = accuracy_by_letters(
    [p.labels["text"] for p in labelled[:300]],
    [p.labels["language"] for p in labelled[:300]],
    (10, 20, 40, 80),
)
for letters, (n_right, n) in by_length.items():
    print(f"first {letters:>3} letters: right {shown(share(n_right, n))}")
results["language"] = {str(letters): share(*pair) for letters, pair in by_length.items()}

# %% [markdown]
# **Exercise 5.** Mask e-mail and IPv4 addresses, and nothing else: `<EMAIL>` and `<IPV4>` take their places. In the part before the @ letters, digits and `. _ % + -` may stand; the sentence's full stop does not belong to the address. An octet is 0 to 255; `10.0.0.1.2` and `300.1.2.3` are no addresses.
#
# <details><summary>Hint</summary>
#
# Build the octet from alternatives, longest range first. `(?<![\w.])` and `(?!\w|\.\w)` say what must not stand before and after.
#
# </details>


# %% exercise="masking"
def my_mask(text):
    """The text with its e-mail and IPv4 addresses replaced by their markers."""
    raise NotImplementedError


# %% check="masking"
check("data/masking", my_mask)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import re
#
#
# def my_mask(text):
#     octet = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
#     email = r"[\w.+%-]*[\w+%-]@[\w-]+(?:\.[\w-]+)+"
#     ipv4 = rf"(?<![\w.])(?:{octet}\.){{3}}{octet}(?!\w|\.\w)"
#     return re.sub(ipv4, "<IPV4>", re.sub(email, "<EMAIL>", text))
# ```
#
# </details>

# %% [markdown]
# ## 3. Near duplicates and contamination
#
# **Why.** A tenth of the pages repeat another word for word, and another tenth after one to three edits. Comparing all pairs does not scale; signatures and bands do.
#
# **Exercise 6.** The MinHash signature of one document: for each pair (a, b) the smallest value of $(ax + b) \bmod 2^{32}$ over the document's shingles x.


# %% exercise="signature"
def my_signature(keys, a, b):
    """keys (N,) uint32; a, b (P,) uint32 -> (P,) uint32."""
    raise NotImplementedError


# %% check="signature"
check("data/signature", my_signature)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_signature(keys, a, b):
#     return (keys[:, None] * a + b).min(axis=0)  # uint32 arithmetic wraps around at 2**32
# ```
#
# </details>
#
# **Exercise 7.** Choose the bands b and rows r, with b r at most n, that minimize the area under the S-curve $1 - (1 - s^r)^b$ below the threshold plus the area above the curve beyond it. Sums over a thousand midpoints on either side are accurate enough.
#
# <details><summary>Hint</summary>
#
# There are only a few hundred pairs (b, r). `below = middle * threshold` and `above = threshold + middle * (1 - threshold)` with `middle = (np.arange(1000) + 0.5) / 1000`; an area is a mean times a width.
#
# </details>


# %% exercise="bands"
def my_choose_bands(n_permutations, threshold):
    """-> (bands, rows)."""
    raise NotImplementedError


# %% check="bands"
check("data/bands", my_choose_bands)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_choose_bands(n_permutations, threshold):
#     middle = (np.arange(1000) + 0.5) / 1000
#     below, above = middle * threshold, threshold + middle * (1 - threshold)
#
#     def cost(choice):
#         b, r = choice
#         false_pairs = threshold * (1 - (1 - below**r) ** b).mean()
#         misses = (1 - threshold) * ((1 - above**r) ** b).mean()
#         return false_pairs + misses
#
#     choices = [(b, r) for b in range(1, n_permutations + 1) for r in range(1, n_permutations // b + 1)]
#     return min(choices, key=cost)
# ```
#
# </details>
#
# **Predict.** With 14 bands of 8 rows, at which similarity are half of the pairs found? Then the measurement: texts after one to six rounds of such edits, their true similarity, and whether any band agrees.

# %%
edits = random.Random(SEED + 3)
originals = [
    page.labels["text"]
    for page in web_dump(town, sizes["pairs"], seed=SEED + 4)
    if page.labels["duplicate"] is None
]
copies = []
for text in originals:
    copy = text
    for _ in range(1 + edits.randrange(6)):
        copy = near_copy(edits, copy)[0]
    copies.append(copy)
index = np.arange(len(originals))
pairs = np.stack([index, index + len(originals)], axis=1)
true_jaccard = shingles.jaccard([*originals, *copies], pairs)
signed = signatures([*originals, *copies])
estimated = estimate_jaccard(signed, pairs)
agree = signed[: len(originals)] == signed[len(originals) :]  # (pairs, 112)
found = {(b, r): agree[:, : b * r].reshape(-1, b, r).all(axis=2).any(axis=1) for b, r in ((14, 8), (28, 4))}
edges = np.linspace(0, 1, 13)
results["scurve"] = {}
series, bands = {}, {}
for (b, r), hit in found.items():
    middles, rates, low, high, theory = [], [], [], [], []
    for left, right_edge in pairwise(edges):
        inside = (true_jaccard > left) & (true_jaccard <= right_edge) & (true_jaccard < 1)
        if inside.sum() >= 20:
            rate = wilson_interval(int(hit[inside].sum()), int(inside.sum()))
            middles.append(float(true_jaccard[inside].mean()))
            rates.append(rate.value)
            low.append(rate.low)
            high.append(rate.high)
            theory.append(float(probability(true_jaccard[inside], b, r).mean()))
    series[f"{b} x {r}, formula"] = middles, theory
    series[f"{b} x {r}, measured"] = middles, rates
    bands[f"{b} x {r}, measured"] = low, high
    results["scurve"][f"{b}x{r}"] = {
        "similarity": middles,
        "measured": rates,
        "low": low,
        "high": high,
        "theory": theory,
    }
figure = plotting.lines(
    series, bands=bands, markers=True, xlabel="Jaccard similarity of the pair", ylabel="share of pairs found",
    title=f"{int((true_jaccard < 1).sum()):,} edited copies: two choices of bands",
)  # fmt: skip
plotting.show(
    figure,
    alt="Share of pairs found against their similarity for 14 bands of 8 and 28 bands of 4 rows: the measured points lie on the S-curves of the formula.",
)
error = estimated - true_jaccard
expected_error = math.sqrt(float((true_jaccard * (1 - true_jaccard)).mean() / signed.shape[1]))
print(
    f"estimate minus truth: mean {error.mean():+.4f}, standard deviation {error.std():.4f}; the formula says {expected_error:.4f}"
)
results["estimate"] = {
    "bias": float(error.mean()),
    "deviation": float(error.std()),
    "expected": expected_error,
    "pairs": len(error),
}

# %% [markdown]
# **Read the result.** Both curves are predicted from two numbers each. (The spread of the estimates is a little smaller than the formula's, because all pairs share one draw of permutations and many phrases.) More bands of fewer rows find the loosely similar as well: also those that are similar by chance.
#
# **Exercise 8.** Which documents repeat an evaluation item? A document is contaminated if it shares n words in a row with an item; an item of fewer than n words is looked for as a whole. `llmcourse.data.decontamination.ngram_words(text)` gives the normalized words.


# %% exercise="contamination"
def my_contaminated(documents, items, n):
    """list of texts, list of texts, n -> indices of contaminated documents, in order."""
    raise NotImplementedError


# %% check="contamination"
check("data/contamination", my_contaminated)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# from llmcourse.data.decontamination import ngram_words
#
#
# def my_contaminated(documents, items, n):
#     def grams(words, size):
#         return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
#
#     wanted = [(min(n, len(words)), words) for words in map(ngram_words, items)]
#     return [
#         i for i, text in enumerate(documents)
#         if any(grams(words, size) & grams(ngram_words(text), size) for size, words in wanted)
#     ]
# ```
#
# </details>
#
# **Real text.** The same functions on text that nobody generated. What repeats in the documentation of Python and of the packages installed here?

# %%
corpus = load_corpus(CORPUS)
real = [*corpus.train["text"], *corpus.validation["text"]]
sources = [*corpus.train["source"], *corpus.validation["source"]]
started = time.perf_counter()
n_exact = int((first_occurrences(real) != np.arange(len(real))).sum())
near = near_duplicates(real, MinHashSettings(verify="exact", threshold=0.7))
cleaned, lines = deduplicate_lines(real, LineSettings(min_documents=10, min_characters=20))
seconds = time.perf_counter() - started
removed = sum(map(len, real)) - sum(map(len, cleaned))
print(f"{len(real):,} documents, {sum(map(len, real)) / 1e6:.1f} million characters, in {seconds:.1f} s")
print(
    f"{n_exact} exact duplicates, {int((~near.keep).sum())} near duplicates in {len(set(near.kept[~near.keep]))} clusters, {lines.n_dropped:,} of {lines.n_lines:,} lines repeated"
)
clusters = Counter(near.kept[~near.keep].tolist()).most_common(3)
for first_one, n in clusters:
    members = np.flatnonzero(near.kept == first_one)[:3]
    print(
        f"\n{n + 1} alike: {', '.join(sources[i] for i in members)}\n    {' '.join(real[first_one].split())[:160]}"
    )
results["real"] = {
    "documents": len(real), "characters": sum(map(len, real)), "exact": n_exact, "near": int((~near.keep).sum()),
    "lines": lines.n_lines, "repeated_lines": lines.n_dropped, "removed_characters": removed, "seconds": seconds,
}  # fmt: skip

# %% [markdown]
# ## 4. The funnel, and what it is worth
#
# **Why.** Each step was measured by itself. Now all of them in their order, on a dump that they have not seen. Into it go 80 advertisements in quiet prose and 80 held-out sums of the course's evaluation, half of them verbatim and half turned around (`181 = 84 + 97`), which no n-gram of the original can match.

# %%
items = [probe.prompt + probe.answer for probe in town.sum_probes(80, seed=SEED)]


def turned(item):
    """'84 + 97 = 181' -> '181 = 84 + 97'."""
    left, _, right = item.partition(" = ")
    return f"{right} = {left}"


def dirty_pages(n, seed):
    """A dump with evaluation items planted in pages that nobody copied, and with quiet spam."""
    rng = random.Random(seed)
    dump = list(web_dump(town, n, seed=seed))
    copied = {page.labels["duplicate_of"] for page in dump}
    good = [
        i for i, page in enumerate(dump)
        if page.labels["duplicate"] is None and page.url not in copied and page.labels["language"] == "en" and page.labels["kind"] != "spam"
    ]  # fmt: skip
    planted = {
        i: item if k % 2 else turned(item)
        for k, (i, item) in enumerate(zip(rng.sample(good, len(items)), items, strict=True))
    }
    made = []
    for i, page in enumerate(dump):
        html, labels = page.html, page.labels | {"contaminated": i in planted}
        if i in planted:
            labels["text"] = f"{planted[i]}\n\n{labels['text']}"
            html = html.replace("<p>", f"<p>{planted[i]}</p>\n<p>", 1)
        made.append(WebPage(page.url, html, labels))
    for k in range(80):
        text = quiet_spam(rng, 5)
        labels = made[0].labels | {"text": text, "kind": "spam", "language": "en", "duplicate": None, "duplicate_of": None,
                                   "personal_data": [], "encoding": "utf-8", "contaminated": False}  # fmt: skip
        made.append(
            WebPage(
                f"https://offers.example/{k}.html",
                f"<html><body><main><p>{text}</p></main></body></html>",
                labels,
            )
        )
    rng.shuffle(made)
    return made


raw = dirty_pages(sizes["pages"], SEED + 5)
funnel_settings = PreparationSettings(quality=classifier, items=tuple(items))
prepared = prepare(raw, funnel_settings, progress=True)
results["funnel"] = []
print(f"\n{'step':>14} {'in':>6} {'out':>6} {'words out':>10} {'seconds':>8}   {'precision':<22} recall")
for row, step in zip(prepared.table(), prepared.reports, strict=True):
    found = step.detection
    scores = {
        "precision": share(found.true_positives, found.n_flagged) if found else None,
        "recall": share(found.true_positives, found.n_positive) if found else None,
        "f1": found.f1 if found and not math.isnan(found.f1) else None,
    }
    keys = ("name", "documents_in", "documents_out", "words_in", "words_out", "changed", "seconds", "dropped")
    results["funnel"].append({key: row[key] for key in keys} | scores)
    print(
        f"{row['name']:>14} {row['documents_in']:>6} {row['documents_out']:>6} {row['words_out']:>10,} {row['seconds']:>8.2f}   {shown(scores['precision']):<22} {shown(scores['recall'])}"
    )
closed = all(step.documents_in == step.documents_out + step.dropped.total() for step in prepared.reports)
print(
    f"{len(raw)} pages in {prepared.seconds:.1f} s: {len(raw) / prepared.seconds:.0f} pages/s, extraction {prepared.report('extract').seconds / prepared.seconds:.0%} of the time"
)
results["pages_per_second"] = len(raw) / prepared.seconds
figure = plotting.bars(
    [step.name for step in prepared.reports], [step.documents_out for step in prepared.reports],
    ylabel="documents left", title="The funnel",
)  # fmt: skip
plotting.show(
    figure,
    alt="Bars of the documents left after each step: extraction and repair change text only; language, rules, quality, duplicates and contamination take documents away.",
)

# %% [markdown]
# **Read the result.** The weak recalls have reasons that can be looked up. For near duplicates: which similarity did the missed pages have?

# %%
kept = {raw[int(i)].url for i in prepared.numbers}
pairs_by_similarity = [
    (page.labels["jaccard"], page.url in kept and page.labels["duplicate_of"] in kept) for page in raw if page.labels["duplicate"] == "near"
]  # fmt: skip
results["missed"] = []
for low_end, high_end in ((0.0, 0.5), (0.5, 0.7), (0.7, 0.85), (0.85, 1.01)):
    group = [both_left for similarity, both_left in pairs_by_similarity if low_end <= similarity < high_end]
    results["missed"].append(
        {"from": low_end, "to": min(1.0, high_end), "pairs": len(group), "left": sum(group)}
    )
    print(
        f"similarity {low_end:.2f} to {min(1.0, high_end):.2f}: of {len(group):>3} edited copies {sum(group):>3} are still there beside their original"
    )
left_over = [page.labels for page in raw if page.url in kept and page.labels["contaminated"]]
verbatim_left = sum(any(item in label["text"] for item in items) for label in left_over)
false_alarms = prepared.report("contamination").detection.false_positives
print(
    f"contaminated pages left: {len(left_over)}, of them verbatim {verbatim_left}; clean pages dropped as contaminated: {false_alarms}"
)
clean_labels = [page.labels["text"] for page in raw if not page.labels["contaminated"]]
example = Decontaminator(items).find(clean_labels)[:1]
for hit in example:
    print(
        f"a false alarm: {hit.ngram!r} in {clean_labels[hit.document][max(0, hit.start - 20) : hit.end + 10]!r}"
    )
results["contamination"] = {
    "left": len(left_over),
    "verbatim_left": verbatim_left,
    "false_alarms": false_alarms,
}

# %% [markdown]
# The short edited texts lie to the left of the S-curve: no threshold that spares different texts will catch them. The items that were turned around passed, as predicted. And the false alarms are a lesson of their own: an item of five words, such as `14 - 5 = 9`, occurs as an intermediate step inside another sum. Whether that is contamination is a question about the evaluation, not about the code.
#
# **What is it worth?** The same small model, the same number of tokens, four corpora: all visible text, the extracted text, the prepared text, and what the authors wrote without any dirt. Validation is always clean text of other pages. The tokenizer was trained on the *dirty* text, so the clean corpora have the disadvantage there. Runs of one seed share initial weights; differences are taken seed by seed.
#
# **Predict.** The order of the four, and which of the three steps between them is the largest.

# %%
spotless = WebSettings(exact_duplicates=0, near_duplicates=0, foreign=0, spam=0, personal_data=0, non_ascii=0)
corpora = {
    "all visible": [strip_tags(page.html) for page in raw],
    "extracted": prepare(raw, PreparationSettings(steps=("decode", "extract"))).texts,
    "prepared": prepared.texts,
    "without dirt": [
        page.labels["text"] for page in web_dump(town, sizes["pages"], seed=SEED + 6, settings=spotless)
    ],
}
held_out = [page.labels["text"] for page in web_dump(town, 150, seed=SEED + 7, settings=spotless)]
tokenizer = Tokenizer.train(corpora["all visible"], 1024)
streams = {name: tokenize(texts, tokenizer, progress=False) for name, texts in corpora.items()}
SMALL = ModelConfig(
    vocab_size=tokenizer.vocab_size, context_length=128, d_model=sizes["width"], n_layers=2, n_heads=4, n_kv_heads=2, d_ff=3 * sizes["width"],
)  # fmt: skip
validation = whole_document_batches(
    tokenize(held_out, tokenizer, progress=False), batch_size=32, context_length=SMALL.context_length
)


def train_small(stream, seed, steps):
    """A fresh small model after `steps` batches of 8 rows of 128 tokens."""
    set_seed(seed)
    model = Transformer(SMALL).to(device)
    batches = PackedBatches(stream, batch_size=8, context_length=SMALL.context_length, seed=seed)
    settings = FitSettings(
        steps=steps, warmup_steps=steps // 10, lr=1e-2, optimizer="muon", schedule="wsd", compile="off", precision="fp32", seed=seed
    )  # fmt: skip
    fit(model, batches, next_token_loss, settings, progress=False)
    return model.eval()


losses = {name: [] for name in corpora}
for seed, name in progress(
    [(seed, name) for seed in seeds for name in corpora], description="runs", unit="run"
):
    losses[name].append(
        token_loss(train_small(streams[name], seed, sizes["steps"]), validation).nats_per_token
    )
tokens_seen = sizes["steps"] * 8 * SMALL.context_length
print(
    f"validation loss after {tokens_seen:,} tokens, nats per token; mean and 95 % interval over {len(seeds)} seeds"
)
results["worth"] = {
    "tokens": tokens_seen,
    "loss": losses,
    "corpus_tokens": {name: len(s) for name, s in streams.items()},
    "gain": {},
}
for before, name in zip([None, *corpora], corpora, strict=False):
    text = f"{name:>13}: {seed_interval(losses[name]):.3f}"
    if before:
        gain = seed_interval([b - a for b, a in zip(losses[before], losses[name], strict=True)])
        results["worth"]["gain"][name] = {"value": gain.value, "low": gain.low, "high": gain.high}
        text += f"; below '{before}' by {gain:.3f}"
    print(text)
means = [statistics.fmean(values) for values in losses.values()]
spread = [
    [m - min(v) for m, v in zip(means, losses.values(), strict=True)],
    [max(v) - m for m, v in zip(means, losses.values(), strict=True)],
]
figure = plotting.bars(
    list(losses),
    means,
    spread,
    ylabel="validation loss, nats per token",
    title=f"Equal tokens, {len(seeds)} seeds: mean and range",
)
plotting.show(
    figure,
    alt="Validation loss of the same model trained on four corpora: highest for all visible text, lower for extracted, lower again for prepared, lowest for text without dirt.",
)

# %% [markdown]
# **Read the result.** Equal tokens are not equal *useful* tokens: a part of the budget went into menus, German, and advertisements. A longer run can afford to learn those as well, and the smaller, clean corpus is repeated sooner, which has its own price (section 5); so the difference should shrink. This lab does not measure it.

# %% [markdown]
# ## 5. Tokens, mixtures, streams
#
# **Why.** What the model reads are ids, in an order, in rows. Each of the three can lose something.
#
# **Exercise 9.** One step of byte-pair encoding. `words` maps words, as tuples of ids, to their frequencies. Find the most frequent pair of neighbors (in a tie the smallest pair) and replace it by `new_id` in all words, from left to right.
#
# <details><summary>Hint</summary>
#
# A word that occurs nine times counts its pairs nine times. In (4, 4, 4) the first two are joined.
#
# </details>


# %% exercise="merge_step"
def my_merge_step(words, new_id):
    """{(1, 2, 1, 2): 3}, 9 -> ((1, 2), {(9, 9): 3})."""
    raise NotImplementedError


# %% check="merge_step"
check("data/merge_step", my_merge_step)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# from llmcourse.tokenization.bpe import count_pairs, merge_pair
#
#
# def my_merge_step(words, new_id):
#     pairs = count_pairs(words)
#     best = min(pairs, key=lambda pair: (-pairs[pair], pair))
#     return best, {merge_pair(word, best, new_id): count for word, count in words.items()}
# ```
#
# The two helpers are ten lines each.
#
# </details>
#
# **Run: from scratch, then the curve.** Our `train_bpe` on some 300 kB of prepared text, against the library on the same text; then bytes per token on held-out text, for vocabularies of growing size, and across domains.

# %%
sample, size = [], 0
for text in prepared.texts:
    sample.append(text)
    size += len(text.encode())
    if size > 300_000:
        break
started = time.perf_counter()
from_scratch = train_bpe(sample, 1024, special_tokens=SPECIAL_TOKENS)
bpe_seconds = time.perf_counter() - started
library = Tokenizer.train(sample, 1024)
probe_texts = [*held_out[:50], *real[:50]]
same_ids = all(from_scratch.encode(text) == library.encode(text) for text in probe_texts)
print(
    f"{size / 1e3:.0f} kB, {len(from_scratch.merges)} merges in {bpe_seconds:.1f} s from scratch; same ids as `tokenizers` on {len(probe_texts)} texts: {same_ids}"
)
results["bpe"] = {
    "bytes": size,
    "seconds": bpe_seconds,
    "merges": len(from_scratch.merges),
    "same_ids": same_ids,
}

# %%
real_train, real_test = corpus.train["text"][: len(corpus.train) // 2], corpus.validation["text"]
domains = {"town": (prepared.texts, held_out), "documentation": (real_train, real_test)}
vocabularies = (300, 512, 1024, 2048, 4096)
rate = {}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the town fills no large vocabulary: its curve ends early, as it should
    for trained_on, (train_texts, _) in domains.items():
        for vocab_size in vocabularies:
            trained = Tokenizer.train(train_texts, vocab_size)
            for tested_on, (_, test_texts) in domains.items():
                n_bytes, n_tokens = (
                    sum(len(t.encode()) for t in test_texts),
                    sum(map(len, trained.encode_batch(test_texts))),
                )
                rate.setdefault(f"{trained_on} on {tested_on}", []).append(n_bytes / n_tokens)
figure = plotting.lines(
    {name: (vocabularies, values) for name, values in rate.items()}, markers=True, logx=True,
    xlabel="vocabulary asked for", ylabel="bytes per token", title="Compression of held-out text, trained on / measured on",
)  # fmt: skip
plotting.show(
    figure,
    alt="Bytes per token against vocabulary: each tokenizer compresses its own domain best; the town's tokenizer stays low on documentation at every size.",
)
for name, values in rate.items():
    print(f"{name:>32}: " + ", ".join(f"{v} {x:.2f}" for v, x in zip(vocabularies, values, strict=True)))
results["compression"] = {"vocabularies": vocabularies, "bytes_per_token": rate}

# %% [markdown]
# **Read the result.** On its own domain each tokenizer gains with its vocabulary, and less each time; the town's curve ends early, where no pair occurs twice. On the other domain it needs far more tokens for the same text: a model pays for them in context length and in compute.
#
# **Exercise 10.** Mixture weights by temperature: $p_i = n_i^{1/t} / \sum_j n_j^{1/t}$.


# %% exercise="mixture"
def my_temperature_weights(tokens, temperature=1.0):
    """{"web": 900, "code": 100}, 2.0 -> {"web": 0.75, "code": 0.25}."""
    raise NotImplementedError


# %% check="mixture"
check("data/mixture", my_temperature_weights)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_temperature_weights(tokens, temperature=1.0):
#     raised = {name: n ** (1 / temperature) for name, n in tokens.items()}
#     return {name: value / sum(raised.values()) for name, value in raised.items()}
# ```
#
# </details>
#
# **Run.** A plan for a run over the prepared pages and the documentation, and a stream that keeps to it.

# %%
n_tokens = {
    "town": len(streams["prepared"]),
    "documentation": sum(map(len, tokenizer.encode_batch(real_train))),
}
budget = 20 * n_tokens["town"]
results["mixture"] = {}
for temperature in (1.0, 2.0, 5.0):
    plan = plan_mixture(n_tokens, budget, temperature=temperature)
    parts = {
        name: f"{part.weight:.2f}, {part.epochs:.1f} epochs worth {part.effective_tokens / n_tokens[name]:.1f}"
        for name, part in plan.parts.items()
    }
    print(f"t = {temperature:g}: {parts}" + "".join(f"\n    {warning}" for warning in plan.warnings))
    results["mixture"][f"{temperature:g}"] = {
        name: {"weight": part.weight, "epochs": part.epochs} for name, part in plan.parts.items()
    }
wanted = plan_mixture(n_tokens, budget, temperature=2.0).weights
mixed = MixedStream(
    {"town": ListSource(prepared.texts, seed=SEED), "documentation": ListSource(real_train, seed=SEED)}, MixtureSettings(weights=wanted, seed=SEED)
)  # fmt: skip
for _ in range(1500):
    mixed.next()
realized = {name: part.share for name, part in mixed.shares.items()}
print(
    f"wanted { ({name: round(w, 4) for name, w in wanted.items()}) }, realized after 1500 documents { ({name: round(w, 4) for name, w in realized.items()}) }"
)

# %% [markdown]
# **Exercise 11.** Pack documents into rows of T: every document ended by `eos_id`, all of them one after another, cut every T tokens. The input at each place is the token before the target; before the very first it is `eos_id`. `documents` numbers the document that the *target* belongs to, so that a mask can keep documents of a row apart. The last incomplete row is left out.


# %% exercise="packing"
def my_pack(documents, context_length, eos_id):
    """list of lists of ids -> {"tokens": rows, "targets": rows, "documents": rows}, each a list of lists."""
    raise NotImplementedError


# %% check="packing"
check("data/packing", my_pack)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_pack(documents, context_length, eos_id):
#     targets = [token for ids in documents for token in [*ids, eos_id]]
#     owners = [i for i, ids in enumerate(documents) for _ in range(len(ids) + 1)]
#     tokens = [eos_id, *targets[:-1]]
#     n = len(targets) // context_length * context_length
#     columns = {"tokens": tokens, "targets": targets, "documents": owners}
#     return {
#         name: [values[i : i + context_length] for i in range(0, n, context_length)]
#         for name, values in columns.items()
#     }
# ```
#
# </details>
#
# **Run: three ways to fill rows of 128, and a stream that is stopped.** What is wasted, what is cut; then documents from shards on disk, tokenized as they come, saved as a few numbers after seven batches and resumed by objects that know nothing else.

# %%
T = SMALL.context_length
lengths = streams["prepared"].lengths
rows = whole_document_batches(streams["prepared"], batch_size=64, context_length=T)
n_rows = sum(batch["tokens"].shape[0] for batch in rows)
packing = {
    "one document a row": {
        "padding": float(1 - np.minimum(lengths, T).mean() / T),
        "cut": float((lengths > T).mean()),
    },
    "end to end": {"padding": 0.0, "cut": float(np.minimum(1, (lengths - 1) / T).mean())},
    "best fit": {"padding": float(1 - lengths.sum() / (n_rows * T)), "cut": float((lengths > T).mean())},
}
for name, row in packing.items():
    print(f"{name:>19}: {row['padding']:6.1%} padding, {row['cut']:6.1%} of the documents cut")
results["packing"] = packing

# %%
with tempfile.TemporaryDirectory() as folder:
    shards = Path(folder, "shards")
    write_shards(prepared.texts, shards, n_shards=4)

    def stream_batches():
        """Batches from the shards, from the beginning."""
        return StreamedBatches(
            ShardStream(shards, StreamSettings(seed=SEED, buffer=256)),
            tokenizer,
            batch_size=4,
            context_length=T,
        )

    whole = stream_batches()
    uninterrupted = [whole.next() for _ in range(20)]
    before = stream_batches()
    for _ in range(7):
        before.next()
    state = json.dumps(before.state_dict())  # all that a checkpoint keeps
    after = stream_batches()
    after.load_state_dict(json.loads(state))
    resumed = [after.next() for _ in range(13)]
    broken_shard = open_shards(shards).shards[1].path
    data = bytearray(broken_shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    broken_shard.write_bytes(data)
    try:
        damaged = stream_batches()
        for _ in range(400):
            damaged.next()
        damage = None
    except ValueError as error:
        damage = str(error).replace(folder, "")
same_bits = all(
    torch.equal(a[name], b[name]) for a, b in zip(uninterrupted[7:], resumed, strict=True) for name in a
)
print(
    f"state of {len(state)} characters; the next 13 batches equal those of a stream never stopped: {same_bits}"
)
print(f"one byte of a shard flipped: {damage}")
results["resume"] = {"state_characters": len(state), "equal": same_bits}

# %% [markdown]
# ## The same with the library
#
# `datasketch` is the usual choice for MinHash in Python, `tokenizers` trained the curves above, and the whole funnel as a list of `datatrove` blocks, for a cluster, is in `llmcourse/data/datatrove_pipeline.py`. Near duplicates of the same 600 texts, with the same shingles and bands, but datasketch's own permutations:

# %%
from datasketch import MinHash, MinHashLSH

some = corpora["prepared"][:200] + originals[:200] + copies[:200]
started = time.perf_counter()
ours = near_duplicates(some)
our_seconds = time.perf_counter() - started
started = time.perf_counter()
index = MinHashLSH(num_perm=112, params=(14, 8))
theirs = []
for i, text in enumerate(some):
    words = shingles.words(text)
    grams = [" ".join(words[k : k + 5]).encode() for k in range(max(1, len(words) - 4))]
    sketch = MinHash(num_perm=112, seed=SEED + 1)
    sketch.update_batch(grams)
    theirs += [(int(j), i) for j in index.query(sketch)]
    index.insert(str(i), sketch)
their_seconds = time.perf_counter() - started
our_pairs, their_pairs = set(map(tuple, ours.pairs.tolist())), set(theirs)
surely = {pair for pair in our_pairs | their_pairs if shingles.jaccard(some, np.array([pair]))[0] >= 0.9}
both_found = len(our_pairs & their_pairs & surely) / len(surely)
print(
    f"{len(our_pairs)} pairs here, {len(their_pairs)} there, {len(our_pairs & their_pairs)} in both; of the {len(surely)} with similarity 0.9 or more, {both_found:.1%} in both"
)
print(f"{1e3 * our_seconds:.0f} ms here, {1e3 * their_seconds:.0f} ms there")
results["library"] = {
    "ours": len(our_pairs),
    "theirs": len(their_pairs),
    "both": len(our_pairs & their_pairs),
    "sure_in_both": both_found,
    "ratio": their_seconds / our_seconds,
}

# %% [markdown]
# Pairs in the middle of the S-curve are found by one set of permutations and not by the other. That is no disagreement but the method: the search is random, and its recall is the curve.
#
# ## Measured results
#
# What this lab claims. Each line is computed from the runs above, and the lab stops if one does not hold.

# %%
# NBVAL_CHECK_OUTPUT
steps = {row["name"]: row for row in results["funnel"]}
claim(
    "robots",
    forbidden == 0 and gap >= 0.005,
    "no request to a forbidden folder, and none sooner than robots.txt asks for",
)
claim("once", refetched == 0, "no page is fetched twice, although the crawl was stopped and resumed")
claim(
    "outcomes",
    right == len(truth),
    "every address of the site, hazards included, ends as a careful crawler should count it",
)
claim(
    "extraction",
    results["extraction"]["main text"]["f1"] > 0.97 > 0.90 > results["extraction"]["all visible"]["f1"],
    "the main text is extracted with an F1 above 0.97; all visible text stays below 0.90",
)
claim(
    "published",
    results["rules"]["Gopher"]["good_lost"]["value"] > 0.25,
    "Gopher's rules, unchanged, drop more than a quarter of the good texts of the town",
)
claim(
    "own-rules",
    results["rules"]["for the town"]["precision"]["value"] > 0.95
    and results["rules"]["for the town"]["recall"]["value"] > 0.95,
    "bounds chosen on this kind of text find its spam with precision and recall above 0.95",
)
claim(
    "shift",
    results["classifier"]["loud spam only"]["loud_recall"]["low"]
    > results["classifier"]["loud spam only"]["quiet_recall"]["high"],
    "a classifier finds the kind of spam it was trained on more surely than another kind",
)
claim(
    "shown",
    results["classifier"]["loud and quiet"]["quiet_recall"]["low"]
    > results["classifier"]["loud spam only"]["quiet_recall"]["high"],
    "shown a few examples of the other kind, it finds more of it",
)
inside = [
    low - 0.02 <= t <= high + 0.02
    for c in results["scurve"].values()
    for low, t, high in zip(c["low"], c["theory"], c["high"], strict=True)
]
claim(
    "calibration",
    curves["after Platt's sigmoid"].error < curves["regression alone"].error,
    "Platt's sigmoid, fitted on held-back texts, lowers the calibration error on another dump",
)
claim("scurve", sum(inside) >= 0.9 * len(inside), "the measured share of pairs found follows the S-curve")
claim(
    "unbiased",
    abs(results["estimate"]["bias"]) < 0.02,
    "signatures estimate the similarity without bias, to 0.02",
)
claim("closed", closed, "at every step, documents in are documents out plus documents dropped for a reason")
claim(
    "repair",
    steps["repair"]["f1"] > 0.95 and steps["privacy"]["f1"] > 0.95,
    "broken encodings are repaired and personal data found, each with an F1 above 0.95",
)
claim("verbatim", verbatim_left == 0, "no document that holds an evaluation item verbatim is left")
claim("turned", len(left_over) > 0, "documents with an item turned around are left: n-grams do not see them")
claim(
    "worth",
    all(
        a > b > c
        for a, b, c in zip(losses["all visible"], losses["extracted"], losses["prepared"], strict=True)
    ),
    "at equal tokens, extraction lowers the validation loss and preparation lowers it further, in every seed",
)
claim("bpe", same_ids, "byte-pair encoding from scratch gives the ids of the library")
last = {name: values[-1] for name, values in rate.items()}
claim(
    "mismatch",
    last["town on documentation"] < 0.75 * last["documentation on documentation"],
    "the town's tokenizer needs at least a third more tokens for documentation than its own",
)
claim(
    "mixture",
    all(abs(realized[name] - wanted[name]) < 0.02 for name in wanted),
    "the realized mixture is within 0.02 of the wanted one",
)
claim(
    "resume",
    same_bits and damage is not None,
    "a stream resumes at the same token, and a damaged shard is named",
)
claim("datasketch", both_found > 0.95, "datasketch finds the same pairs where similarity is 0.9 or more")

# %% [markdown]
# ## Break it
#
# **Three ways to be fooled.** First, the validation set is split off *before* duplicates are removed, as one does when the data arrive in one file. Train on one half of the extracted pages and measure on the other.

# %%
english = [page for page in raw if page.labels["language"] == "en" and page.labels["kind"] != "spam"][:900]
order = random.Random(SEED).sample(range(len(english)), len(english))
half = len(english) // 2
train_half, test_half = ([english[i].labels for i in part] for part in (order[:half], order[half:]))
names = {id(page.labels): page.labels["duplicate_of"] or page.url for page in english}
seen_clusters = {names[id(label)] for label in train_half}
leaked = np.array([names[id(label)] in seen_clusters for label in test_half])
fooled = train_small(
    tokenize([label["text"] for label in train_half], tokenizer, progress=False), SEED, 2 * sizes["steps"]
)


@torch.no_grad()
def document_rates(model, texts):
    """(documents,) nats per token of each text."""
    stream = tokenize(texts, tokenizer, progress=False)
    total = np.zeros(len(texts))
    for batch in whole_document_batches(stream, batch_size=32, context_length=T):
        nats = (
            token_losses(model, batch["tokens"].to(device), batch["targets"].to(device))
            .double()
            .cpu()
            .numpy()
        )
        owners = batch["documents"].numpy()
        np.add.at(total, owners[owners >= 0], nats[owners >= 0])
    return total / stream.lengths


per_document = document_rates(fooled, [label["text"] for label in test_half])
with_copy, without_copy = bootstrap_interval(per_document[leaked]), bootstrap_interval(per_document[~leaked])
print(f"{leaked.mean():.0%} of the validation pages have a copy in training")
print(
    f"loss of those with a copy {with_copy:.3f}, of those without {without_copy:.3f}, of all together {per_document.mean():.3f} nats per token"
)
results["leak"] = {
    "share": float(leaked.mean()), "all": float(per_document.mean()),
    "with_copy": {"value": with_copy.value, "low": with_copy.low, "high": with_copy.high},
    "without_copy": {"value": without_copy.value, "low": without_copy.low, "high": without_copy.high},
}  # fmt: skip

# %% [markdown]
# **Diagnosis.** The reported loss is a mixture of two: what the model can do with new text, and what it remembers. Nothing in the curve says so. The test is to look for each validation document in the training text, by the same search that removes duplicates. Deduplicate, then split.
#
# Second, a search that sounds thorough. The documents are short, so shingles of three words; and "similar" texts are to go, so bands for a similarity of 0.3 instead of 0.7:

# %%
clean_texts = [
    page.labels["text"] for page in web_dump(town, sizes["pages"], seed=SEED + 8, settings=spotless)
]
results["threshold"] = {}
for threshold in (0.7, 0.3):
    b, r = choose_bands(112, threshold)
    lost = near_duplicates(clean_texts, MinHashSettings(bands=b, rows=r, shingle_words=3))
    sizes_of = Counter(lost.kept.tolist())
    dropped_share = float((~lost.keep).mean())
    biggest, n_biggest = sizes_of.most_common(1)[0]
    results["threshold"][f"{threshold}"] = {
        "bands": b,
        "rows": r,
        "dropped": dropped_share,
        "largest": n_biggest,
    }
    print(
        f"threshold {threshold}: {b} bands of {r}: {dropped_share:.1%} of a corpus without a single copy dropped, largest cluster {n_biggest}"
    )
    members = np.flatnonzero(lost.kept == biggest)[:3]
    for i in members:
        print(f"      {clean_texts[i][:110]!r}")

# %% [markdown]
# **Diagnosis.** These pages were written independently; they share phrases, because the town has few ways to say a thing. No two of the large cluster's members need to be alike: A shares phrases with B, B with C, and the chain takes half of the corpus along. Look at the largest clusters before you believe a deduplication, and verify pairs by their exact similarity when the threshold is low.
#
# Third, published thresholds taken as they are. What did Gopher's rules drop in section 2, by kind of text?

# %%
kind_of = {page.labels["text"]: page.labels["kind"] for page in labelled}
judged = filter_texts(texts, gopher())
results["gopher_by_kind"] = {}
for kind in ("story", "record", "sum", "dialogue", "spam"):
    chosen = [d for text, d in zip(texts, judged.dropped, strict=True) if kind_of[text] == kind]
    results["gopher_by_kind"][kind] = share(sum(chosen), len(chosen))
    print(f"{kind:>9}: dropped {shown(results['gopher_by_kind'][kind])}, n={len(chosen)}")

# %% [markdown]
# **Diagnosis.** A rule that wants fifty words and four words in five with a letter removes arithmetic from a corpus, and a model trained on what is left will be bad at sums for a reason that no benchmark explains. Count what a filter drops *by kind*.

# %%
# NBVAL_CHECK_OUTPUT
claim(
    "leak",
    with_copy.high < without_copy.low,
    "validation pages with a copy in training have a lower loss than the others",
)
claim(
    "chains",
    results["threshold"]["0.3"]["dropped"] > 5 * max(results["threshold"]["0.7"]["dropped"], 0.01),
    "at a threshold of 0.3 far more of a corpus without copies is dropped than at 0.7",
)
claim(
    "by-kind",
    results["gopher_by_kind"]["sum"]["low"] > results["gopher_by_kind"]["story"]["high"],
    "Gopher's rules drop sums more often than stories",
)

# %%
store_results("data", results)

# %% [markdown]
# ## Takeaways
#
# * A crawl is judged by the server's log. Everything that can be endless needs a bound, and every address an outcome.
# * Measure a step by precision and recall with intervals, on text it was not chosen on; then read what it dropped.
# * A classifier knows the rubbish it was shown, and its probabilities hold for that mixture only.
# * The S-curve is arithmetic. The choice on it is a price.
# * n-grams see copies, and only copies.
# * Clean text is worth a lot at equal tokens; a tokenizer and a threshold are worth what their sample resembles.
# * Deduplicate before you split, and make the order of a stream a function of a seed and a position.

# %% [markdown]
# ## Next
#
# The chapter, [Data preparation](../book/pretraining/data.md), derives the S-curve and the costs, and says what the large corpora do. [Lab 04](04_pretraining.ipynb) trains on the town's own text, whose entropy is known.
