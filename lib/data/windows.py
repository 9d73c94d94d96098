"""Windows of token ids for calibration and evaluation.

`calibration_windows` draws random windows from one source or from a mix, by each source's
published loop. `test_set` cuts a whole text into windows. lib/data/training.py cuts the windows
that a pruned model is recovered on. lib/data/sources.py defines sources, and
lib/data/documents.py reads their texts.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..util.errors import UserError, counted
from . import hub
from .chats import Dialogue, Document
from .documents import Corpus, Documents, are_dialogues
from .samples import Sample, Windows, join, packed, prepend, spread, windows_of
from .sources import AGAIN, JOINED, Source, mixture_name
from .templates import document_text, sample_of_dialogue, template_of

BUFFER = 1_000  # documents of a stream shuffled together
STREAM_LIMIT = 200_000  # documents of a stream tried before giving up
TEST_CHARACTERS = 4_000_000  # limit of a large set's test text
TEST_BYTES = 1024  # measured per token of a window: about 256 windows
PROMPT = 16  # tokens per prompt
PROMPT_CHARACTERS = 50 * PROMPT  # characters of a document that are tokenized for its prompt
SHORTEST = 128  # tokens; shorter windows only as requested
APART = 4  # windows of plain text start at least 1/4 window apart, on average
log = logging.getLogger(__name__)
Drawn = TypeVar("Drawn")


class TextTooShort(UserError):
    """The texts are too short for the requested windows; windows of `fits` tokens would fit."""

    corpus: Corpus
    fits = 0

    @classmethod
    def of(cls, corpus: Corpus, problem: str, fix: str, fits: int) -> TextTooShort:
        error = corpus.source.error(problem, fix, cls)
        error.corpus, error.fits = corpus, fits
        return error


@dataclass(frozen=True)
class WindowSpec:
    """The shape of windows: `seqlen` tokens of a tokenizer, after `bos` if given, and the seed."""

    tokenizer: PreTrainedTokenizerBase
    seqlen: int
    bos: int | None = None
    seed: int = 0


def calibration_windows(
    corpora: Sequence[Corpus], spec: WindowSpec, nsamples: int
) -> tuple[Windows, dict]:
    """Draw `nsamples` windows, and record where each was drawn from.

    Several sources are mixed by weight: apportioned by largest remainder and interleaved. Each
    source gives the first windows that it would give alone. With `bos` every window begins with
    that token, which replaces its last one if necessary. Dialogues are packed, with their own
    positions and a template's BOS. Raises UserError if the texts have too few windows.
    """
    assert nsamples > 0 and spec.seqlen > 1
    sources = [corpus.source for corpus in corpora]
    counts = apportion([source.weight or 1.0 for source in sources], nsamples)
    cuts, drawn = [], []
    for corpus, count in zip(corpora, counts, strict=True):
        if count == 0:
            log.warning("%s: its weight is too small for a window", corpus.source)
            continue
        cut, record = _draw_windows(corpus, spec, count)
        cuts.append(cut)
        drawn.append(record | {"share": count / nsamples})
    windows = join(cuts)[interleave(counts)]
    ids, positions = windows.ids, windows.positions
    record = {"name": mixture_name(sources), "sources": drawn, "windows": nsamples}
    record |= {"seqlen": spec.seqlen, "tokens": ids.numel(), "bos": spec.bos, "digest": digest(ids)}
    whole = bool((positions[:, 1:] > 0).all())
    return Windows(ids, positions=None if whole else positions), record


def fitting_windows(
    draw: Callable[[WindowSpec], Drawn],
    corpora: list[Corpus],
    spec: WindowSpec,
    shortens: bool,
    say: Callable[[str], Any],
) -> Drawn:
    """Return `draw(spec)`, which may find the texts of `corpora` too short for windows of `spec`.

    If it `shortens`, a window then becomes the largest power of two for which they suffice. If that
    is too short, or it does not, the documents of a source that is not on the Hub are joined into
    one text, also in `corpora`. `say` gets lines about it.
    """
    wanted = spec.seqlen
    while True:
        try:
            drawn = draw(spec)
            break
        except TextTooShort as error:
            short = error.corpus
            if error.fits >= SHORTEST and shortens:
                spec = replace(spec, seqlen=2 ** (error.fits.bit_length() - 1))
                continue
            if short not in corpora or short.source.hub or short.source.draw == JOINED:
                raise
            corpora[corpora.index(short)] = short.joined()
            say(f"{short.source.text}: documents are shorter than a window, so they are joined")
    if spec.seqlen < wanted:
        say(
            f"window: {spec.seqlen} tokens, the largest power of two for which the texts are long "
            f"enough (model: {wanted}); {{--seqlen}} sets another"
        )
    return drawn


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` into whole numbers in proportion to the weights, by largest remainder."""
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def interleave(counts: Sequence[int]) -> list[int]:
    """Return an order of sources' windows that spreads each source evenly over the whole."""
    places = [((2 * j + 1) / n, i, j) for i, n in enumerate(counts) for j in range(n)]
    starts = [0, *accumulate(counts)]
    return [starts[i] + j for _, i, j in sorted(places)]


def _draw_windows(corpus: Corpus, spec: WindowSpec, count: int) -> tuple[Windows, dict]:
    """Draw windows (count, seqlen) from one source, and record where each was drawn from.

    The published loops search endlessly if too few texts are long enough. This one raises
    UserError after it has tried every text.
    """
    drawn: list[tuple[int, int, Windows]] = []  # row, offset in its text, window
    lengths: dict[int, int] = {}  # tokens of each text tried
    rng, seqlen, source = random.Random(spec.seed), spec.seqlen, corpus.source
    documents, revision = corpus.documents("train"), corpus.revision("train")
    record = {"name": source.name, "source": source.text, "revision": revision}
    if are_dialogues(documents):
        # each dialogue up to APART times, since it comes with different neighbors
        every = chain.from_iterable(shuffled(source, documents, rng) for _ in range(APART))
        cut = list(islice(packed_dialogues(source, spec, every), count))
        if len(cut) < count:
            problem = f"its dialogues fill {len(cut)} of {count} windows of {seqlen} tokens"
            fix = f"Give more, or {{--nsamples}} {len(cut)}, or a smaller {{--seqlen}}"
            raise source.error(problem, fix)
        return join(cut), record | {"windows": count}
    for row, ids in _drawn_texts(source, spec, documents, rng):
        lengths[row] = len(ids)
        if len(ids) <= seqlen:
            continue
        start = rng.randint(0, len(ids) - seqlen - 1)
        piece = ids[start : start + seqlen]
        sample = Sample(piece, torch.ones_like(piece).bool())
        drawn.append((row, start, windows_of([sample], seqlen, spec.bos)))
        if len(drawn) == count:
            break
    if len(drawn) < count:
        longest = sorted(lengths.values(), reverse=True)
        needed = 1 if source.draw in (AGAIN, JOINED) else count  # texts that a window must fit
        fits = longest[needed - 1] - 1 if len(longest) >= needed else 0
        fixes = [f"{{--seqlen}} {fits}"] * (fits > 1)
        fixes += [f"{{--nsamples}} {len(drawn)}"] * bool(drawn)
        fix = f"Use {' or '.join(fixes)}" if fixes else "Give longer texts"
        number = f"{len(longest)} text{'s' * (len(longest) > 1)}"
        problem = f"its {number} fill {len(drawn)} of {count} windows of {seqlen} tokens, and the "
        problem += f"longest has {longest[0]} tokens"
        raise TextTooShort.of(corpus, problem, fix, fits)
    tokens = sum(lengths.values())
    needed = seqlen + (count - 1) * seqlen // APART
    # with fewer tokens windows would be nearly equal
    if source.draw == JOINED and not source.hub and tokens < needed:
        most, fits = APART * (tokens - seqlen) // seqlen + 1, APART * tokens // (count + APART - 1)
        problem = f"its {tokens} tokens are {needed - tokens} too few for {count} windows of "
        fix = f"Give more text, {{--nsamples}} {most} or {{--seqlen}} {max(fits, 2)}"
        raise TextTooShort.of(corpus, problem + str(seqlen), fix, fits)
    rows, starts, cut = map(list, zip(*drawn, strict=True))
    return join(cut), record | {"windows": count, "rows": rows, "starts": starts}


def packed_dialogues(
    source: Source, spec: WindowSpec, documents: Iterable[Document], prompted: bool = False
) -> Iterator[Windows]:
    """Yield the windows of documents, some of them dialogues (`lib.data.samples.packed`).

    Logs at the end how many dialogues the chat template rejected, and how many answers are empty.
    """
    left_out: dict[Document, str] = {}
    empty: dict[Document, int] = {}

    def samples() -> Iterator[Sample]:
        for document in documents:
            sample = sample_of(spec.tokenizer, document, spec.bos)
            if sample.empty:
                empty[document] = sample.empty
            if len(sample.ids):
                yield sample
            elif document:
                left_out[document] = template_of(spec.tokenizer).problem

    yield from packed(samples(), spec.seqlen, prompted)
    if left_out:
        what, why = counted(len(left_out), "dialogue"), next(iter(left_out.values()))
        log.warning("%s: the chat template rejects %s, left out: %s", source, what, why)
    if number := sum(empty.values()):
        what, how = counted(number, "answer"), "such as calls of tools; they do not count"
        log.warning("%s: the chat template writes no text for %s, %s", source, what, how)


def _drawn_texts(
    source: Source, spec: WindowSpec, documents: Documents, rng: random.Random
) -> Iterator[tuple[int, Tensor]]:
    """Yield row and token ids (tokens,) of texts in the order of the source's published loop.

    Ends when no remaining text can give another window.
    """
    if source.stream:  # in the order of the stream, each once
        texts = islice(enumerate(documents, documents.first), STREAM_LIMIT)
        for row, text in shuffle_stream(texts, rng):
            yield row, sample_of(spec.tokenizer, text).ids
    elif source.draw == JOINED:
        ids = tokenize(spec.tokenizer, " ".join(documents))
        yield 0, ids
        while len(ids) > spec.seqlen:
            yield 0, ids
    else:
        done: set[int] = set()
        while len(done) < len(documents):
            row = rng.randint(0, len(documents) - 1)
            if row in done:
                continue
            ids = sample_of(spec.tokenizer, documents[row]).ids
            if len(ids) <= spec.seqlen or source.draw != AGAIN:
                done.add(row)
            yield row, ids


def shuffled(source: Source, documents: Documents, rng: random.Random) -> Iterator[Document]:
    """Return at most STREAM_LIMIT documents of the source, in an order drawn by `rng`."""
    if source.stream:
        return shuffle_stream(islice(documents, STREAM_LIMIT), rng)
    rows = rng.sample(range(len(documents)), len(documents))
    return (documents[row] for row in rows[:STREAM_LIMIT])


def shuffle_stream(items: Iterable, rng: random.Random) -> Iterator:
    """Yield the items in an order drawn with `rng`, each within a buffer of BUFFER items."""
    buffer = []
    for item in items:
        if len(buffer) < BUFFER:
            buffer.append(item)
            continue
        index = rng.randrange(BUFFER)
        item, buffer[index] = buffer[index], item
        yield item
    rng.shuffle(buffer)
    yield from buffer


@dataclass(frozen=True, eq=False)
class TestSet:
    """Test windows; `record` goes into results.json.

    Its `bytes` are the UTF-8 bytes of the predicted tokens (`token_bytes`), all except the first of
    each window. So bits per byte = summed loss / ln 2 / bytes, however the tokenizer splits words.
    Special tokens have none. `prompts` are beginnings of documents.
    """

    __test__ = False  # pytest must not collect this class
    name: str
    windows: Windows
    record: dict
    prompts: Sequence[Tensor] = ()  # (tokens,) each, int64
    dialogues: Sequence[Dialogue] = ()  # dialogues whose prompts are answered
    # (windows,), int64: the document of the middle token, or the dialogue that a window begins with
    documents: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        return self.windows.ids


def test_set(
    corpus: Corpus, spec: WindowSpec, n_prompts: int = 0, most: int | None = None
) -> TestSet:
    """Cut the test text into windows: its documents are joined and tokenized as one text.

    The remainder after the last whole window is dropped. A large set is cut to the first documents
    (`hub.TEST_DOCUMENTS`) and `TEST_BYTES`, equally for every tokenizer. With `bos` each window is
    that token and seqlen - 1 tokens of the text. Dialogues are packed, and only the assistant's
    tokens are measured; the rest of a dialogue that was cut is not, see `packed`. `most` limits the
    number of windows, which are evenly spaced. Raises UserError if the text is shorter than one
    window.
    """
    source, texts = corpus.source, test_documents(corpus)
    prompts, asked, more = [], [], {}
    if are_dialogues(texts):
        cut = list(packed_dialogues(source, spec, texts, prompted=True))
        if not cut:
            problem = f"no window of {spec.seqlen} tokens has a question with its answer"
            problem += ", or the chat template rejects all test dialogues"
            raise source.error(problem, "Give others, or a larger {--seqlen}")
        count = len(cut)
        windows = join([cut[number] for number in spread(count, most)])
        documents, counted = windows.documents, windows.counted[:, :-1]
        answers = [ids[mask] for ids, mask in zip(windows.ids[:, 1:], counted, strict=True)]
        plain = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
        size = sum(len(spec.tokenizer.decode(ids, **plain).encode()) for ids in answers)
        more = {"dialogues": len(texts), "answer_tokens": int(counted.sum())}
        asked = list(islice((each for each in texts if isinstance(each, Dialogue)), n_prompts))
    else:
        windows, size, documents, count = _text_windows(corpus, spec, texts, most)
        length = min(PROMPT, spec.seqlen // 2)
        prompts = list(islice(_prompts(texts, spec, length), n_prompts))
        if len(prompts) < n_prompts:  # few documents, such as one long one
            starts = windows.ids[:: max(1, len(windows) // n_prompts), :length]
            prompts += [ids for ids in starts if not any(ids.equal(prompt) for prompt in prompts)]
    ids = windows.ids
    record = {"name": source.name, "source": source.text, "revision": corpus.revision("test")}
    record |= {"windows": len(ids), "seqlen": spec.seqlen, "tokens": ids.numel(), "bytes": size}
    record |= {"bos": spec.bos, "digest": digest(ids)} | more
    record |= {"of_windows": count} if count > len(ids) else {}
    return TestSet(source.name, windows, record, prompts[:n_prompts], asked, documents)


def _text_windows(
    corpus: Corpus, spec: WindowSpec, texts: Sequence[str], most: int | None
) -> tuple[Windows, int, Tensor, int]:
    """Return windows of test texts, their bytes, documents (n,), and the number of all windows."""
    source, seqlen, bos = corpus.source, spec.seqlen, spec.bos
    pieces = [document_text(spec.tokenizer, each) for each in texts]
    text = source.separator.join(pieces)
    if source.sampled:
        text = text.encode()[: TEST_BYTES * seqlen].decode(errors="ignore")
    encoding = encode(spec.tokenizer, text)
    ids = encoding.input_ids[0].long()
    first = int(bos is not None and len(ids) > 0 and ids[0] == bos)
    ids, sizes = ids[first:], token_bytes(encoding, text)
    step = seqlen if bos is None else seqlen - 1  # tokens of the text per window
    count = len(ids) // step
    if not count:
        problem = f"the test text has {len(ids)} tokens, less than one window of {step}"
        fix = f"Use {{--seqlen}} {len(ids)} or less" if len(ids) > 1 else "Give a longer text"
        raise TextTooShort.of(corpus, problem, fix, len(ids))
    each_token = ids, sizes[first:], sizes.cumsum(0)[first:]
    cut = (each[: count * step].view(count, step) for each in each_token)
    windows, sizes, places = (each[spread(count, most)] for each in cut)
    covered = sizes[:, step + 1 - seqlen :].sum().item()  # after BOS the first one is a target
    ends = torch.tensor([len((piece + source.separator).encode()) for piece in pieces]).cumsum(0)
    documents = torch.searchsorted(ends, places[:, step // 2].contiguous())
    windows = windows if bos is None else prepend(windows, bos)
    return Windows(windows), covered, documents, count


def test_documents(corpus: Corpus) -> Sequence[Document]:
    """Return the documents of the test split to evaluate on: of a large set the first ones."""
    documents = corpus.documents("test")
    if not corpus.source.sampled:
        return documents
    selected, length = [], 0
    for text in islice(documents, hub.TEST_DOCUMENTS):
        selected.append(text)
        length += len(text)
        if length > TEST_CHARACTERS:
            break
    return selected


def _prompts(texts: Sequence[str], spec: WindowSpec, tokens: int) -> Iterator[Tensor]:
    """Yield the first `tokens` ids (tokens,) of longer documents, in a fixed random order.

    A prompt begins as the tokenizer begins a text, and with `bos` if given.
    """
    for row in random.Random(0).sample(range(len(texts)), len(texts)):
        text = document_text(spec.tokenizer, texts[row])[:PROMPT_CHARACTERS]
        ids = tokenize(spec.tokenizer, text, spec.bos)
        if len(ids) > tokens:
            yield ids[:tokens]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, bos: int | None = None) -> Tensor:
    """Return the token ids (tokens,) of one text, int64, with the tokenizer's special tokens.

    If `bos` is given, ids begin with it unless the text has none.
    """
    ids = encode(tokenizer, text).input_ids[0].long()  # an empty text gives float
    return ids if bos is None or not len(ids) or ids[0] == bos else prepend(ids[None], bos)[0]


def sample_of(
    tokenizer: PreTrainedTokenizerBase, document: Document, bos: int | None = None
) -> Sample:
    """Return the tokens of a document; for dialogues the template decides about BOS."""
    if isinstance(document, Dialogue):
        return sample_of_dialogue(tokenizer, document)
    ids = tokenize(tokenizer, document, bos)
    return Sample(ids, torch.ones_like(ids).bool())


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> BatchEncoding:
    """Tokenize one text, with the tokenizer's special tokens.

    Suppresses the tokenizer's warning about texts longer than the model's window, since the text
    is cut into windows afterwards.
    """
    return tokenizer(text, return_tensors="pt", return_attention_mask=False, verbose=False)


def token_bytes(encoding: BatchEncoding, text: str) -> Tensor:
    """Return the number of a text's UTF-8 bytes that each token stands for: (tokens,), int64.

    Tokens of the same characters, such as the bytes of one, get equal parts, in whole bytes; so do
    all tokens of a Python tokenizer, which has no offsets. Text that a tokenizer omits, such as
    blanks, counts with the next token, as does a letter that the token ends inside.
    """
    codes = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    sizes = 1 + (codes > 0x7F).long() + (codes > 0x7FF) + (codes > 0xFFFF)
    before = F.pad(sizes.cumsum(0), (1, 0))  # (characters + 1,)
    all_of_it = [(0, len(text))] * encoding.input_ids.shape[1]
    spans = torch.tensor(encoding[0].offsets if encoding.is_fast else all_of_it)  # (tokens, 2)
    run = F.pad((spans[1:] != spans[:-1]).any(1).cumsum(0), (1, 0))  # tokens of the same characters
    length = run.bincount()
    last = length.cumsum(0) - 1  # last token of each run
    ends = before[spans[:, 1].cummax(0).values[last]]  # (runs,), end in bytes
    starts = F.pad(ends[:-1], (1, 0))
    place = torch.arange(1, len(spans) + 1) - (last + 1 - length)[run]  # in its run, from 1 on
    parts = starts[run] + (ends - starts)[run] * place // length[run]
    return parts.diff(prepend=parts.new_zeros(1))


def digest(windows: Tensor) -> str:
    """Return the SHA-256 of the windows' bytes (int64, row by row)."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
