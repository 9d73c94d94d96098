"""The vocabulary of a GGUF file: which tensors have a row and which fields an id for each token.

The rules are those of llama.cpp's loaders (llama-vocab.cpp, llama-model.cpp and models/*.cpp).
Nothing is guessed: what has the size of the vocabulary and is unknown raises UserError.
"""

from __future__ import annotations

import calendar
import hashlib
import re
from collections.abc import Sequence, Set
from dataclasses import replace
from functools import cached_property

import numpy as np

from ..util.errors import UserError
from ..vocabulary.kinds import (
    BLANK,
    BYTE_OF_LETTER,
    BYTE_TOKENS,
    Bpe,
    Scored,
    Unigram,
    Vocabulary,
    WordPiece,
    is_reserved,
    ranks_of,
)
from ..vocabulary.tokenizer_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from .file import STRING, UINT32, Field, GgufFile, Tensor

TOKENIZER = "tokenizer.ggml."
TOKENS, SCORES, TYPES, MERGES = (
    TOKENIZER + name for name in ("tokens", "scores", "token_type", "merges")
)
KINDS = {"gpt2": Bpe, "gemma4": Bpe, "llama": Scored, "t5": Unigram, "bert": WordPiece}

TABLES = re.compile(
    r"(token_embd|output|per_layer_token_embd)\.weight|output\.bias"
    r"|(blk\.\d+\.)?nextn\.(embed_tokens|shared_head_head)\.weight"
)
NOT_TABLES = re.compile(
    r"(position_embd|token_types|cls(\.output)?|blk\.\d+\.(attn|ffn|ssm)_\w+)\.(weight|bias)"
)
# ids in another order, hashes of ids, or expert numbers by id
REFUSED_TENSORS = re.compile(r"d2t|.*ffn_gate_tid2eid.*|masked_embd_(ordering|centroids).*")
REFUSED_FIELDS = re.compile(r"[\w-]+\.ple\..*")
# models of deepseek2 are told apart by their number of tokens, if they have so many layers
TELLING_LAYERS, TELLING_ROWS = (47, 48), (128256, 154880)
BY_POSITION = ("chameleon",)  # llama.cpp knows ids of its image tokens as numbers

ID_FIELDS = re.compile(
    r".*_token_ids?|[\w-]+\.adapters\.token_ids_\w+|tokenizer\.ggml\.suppress_tokens"
    r"|adapter\.alora\.invocation_tokens"
)
COUNTS = re.compile(r"[\w-]+\.vocab_size")
MAYBE_IDS = re.compile(r"token|vocab|(^|[._])ids?($|[._])")
NO_IDS = re.compile(
    r"tokenizer\.ggml\.(token_type(_count)?|precompiled_charsmap)|.*token_shift_count"
    r"|langprune\.vocabulary\.rows_before"
)
LEFT_OUT = re.compile(r"split\..*|tokenizer\.huggingface\.json")
# ids that llama.cpp takes if the file has none
DEFAULTS = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "gpt2": {"bos": 11, "eos": 11},
    "bert": {"bos": 101, "unknown": 100, "seperator": 102, "padding": 0, "mask": 103},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
}
# llama.cpp finds ends, prefixes and image tokens by their text, whatever their type
LOOKS_SPECIAL = re.compile(r"[▁_]?<[^<>\s]{2,}>|\[[A-Z]+\]|\[e~\[")
LITERAL = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")


class GgufVocabulary:
    """The tokens of a file, and what depends on them. Raises UserError if it cannot be trimmed.

    `dropped` are the names of fields to leave out.
    """

    def __init__(self, file: GgufFile, dropped: Set[str] = frozenset()) -> None:
        self.file, self.dropped = file, dropped
        self.kind = file.value(f"{TOKENIZER}model")
        if self.kind not in KINDS or TOKENS not in file.fields:
            problem = f"its tokenizer is of the kind {self.kind}, not of {', '.join(KINDS)}"
            raise self._refused(problem)
        self.raw: list[bytes] = file.fields[TOKENS].value
        # another text in place of a part of a letter, so that no two tokens become equal
        self.tokens = [token.decode(errors="backslashreplace") for token in self.raw]
        self.rows = len(self.raw)
        if len(set(self.tokens)) < self.rows:
            raise self._refused("it has two tokens of the same text")
        for name in (SCORES, TYPES):
            if name in file.fields and len(file.fields[name].value) < self.rows:
                raise self._refused(f"{name} has fewer entries than there are tokens")
        needed = {Bpe: MERGES, Scored: SCORES, Unigram: SCORES}.get(KINDS[self.kind], TOKENS)
        if needed not in file.fields:
            raise self._refused(f"it has no field {needed}")
        self.types = np.ones(self.rows, int)
        if TYPES in file.fields:
            self.types = file.fields[TYPES].value[: self.rows]
        self._check_tensors()
        self._check_fields()
        self.ids = self._ids()

    def _refused(self, problem: str, fix: str = "Only other files can be trimmed") -> UserError:
        return UserError(self.file.what, problem, fix)

    def _check_tensors(self) -> None:
        names = [tensor.name for tensor in self.file.tensors]
        if "token_embd.weight" not in names:
            raise self._refused("it has no token_embd.weight")
        if len(set(names)) < len(names):
            raise self._refused("it has two tensors of the same name")
        for tensor in self.file.tensors:
            name, shape = tensor.name, tensor.shape
            if REFUSED_TENSORS.fullmatch(name.removesuffix(".weight")):
                raise self._refused(f"{name} holds ids in an order of their own")
            if TABLES.fullmatch(name):
                if shape[-1] != self.rows or tensor.data.size % self.rows:
                    problem = f"{name} has {shape[-1]} rows for {self.rows} tokens"
                    raise self._refused(problem)
            elif self.rows in shape and not NOT_TABLES.fullmatch(name):
                problem = f"{name} of the shape {'x'.join(map(str, shape))} is unknown, and may "
                raise self._refused(f"{problem}have a row for each of {self.rows} tokens")
        self.check_count(self.rows)
        if self.file.architecture in BY_POSITION:
            raise self._refused(f"llama.cpp knows tokens of {self.file.architecture} by number")

    def check_count(self, rows: int) -> None:
        """Raise UserError if llama.cpp tells models apart by this number of rows."""
        value, name = self.file.value, self.file.architecture
        layers = value(f"{name}.block_count", 0)
        layers = {layers, layers - (value(f"{name}.nextn_predict_layers") or 0)}
        if name == "deepseek2" and rows in TELLING_ROWS and layers & set(TELLING_LAYERS):
            raise self._refused(f"llama.cpp takes it for another model by its {rows} tokens")

    def _check_fields(self) -> None:
        for name, field in self.file.fields.items():
            if name in self.dropped or LEFT_OUT.fullmatch(name):
                continue
            if REFUSED_FIELDS.fullmatch(name):
                raise self._refused(f"{name} belongs to hashes of ids")
            known = any(each.fullmatch(name) for each in (ID_FIELDS, COUNTS, NO_IDS))
            if field.is_integer and MAYBE_IDS.search(name) and not known:
                problem = f"{name} is unknown, and may hold ids of tokens"
                raise self._refused(problem, f"If nothing needs it, add --drop {name}")
        if unknown := self.dropped - self.file.fields.keys():
            name = min(unknown)
            raise UserError(f"--drop {name}", "there is no such field", "Check its name")

    def _ids(self) -> dict[str, int]:
        """Return single ids by field, with those that llama.cpp takes without a field."""
        ids = {f"{TOKENIZER}{n}_token_id": i for n, i in DEFAULTS.get(self.kind, {}).items()}
        for name, field in self.file.fields.items():
            is_id = ID_FIELDS.fullmatch(name) and name not in self.dropped
            if is_id and np.ndim(field.value) == 0 and 0 <= field.value < self.rows:
                ids[name] = field.value
        return {name: index for name, index in ids.items() if index < self.rows}

    @property
    def named(self) -> set[int]:
        """The ids in fields, which must stay; those to suppress need not."""
        ids = set(self.ids.values())
        for name, field in self.file.fields.items():
            if ID_FIELDS.fullmatch(name) and np.ndim(field.value) and "suppress" not in name:
                ids |= {index for index in field.value.tolist() if 0 <= index < self.rows}
        return ids

    def template_texts(self) -> list[str]:
        """Return texts whose tokens the chat templates need: all of them, and dates if any."""
        fields = self.file.fields
        names = [name for name in fields if name.startswith("tokenizer.chat_template")]
        names = [name for name in names if fields[name].kind == STRING]
        texts = [self.file.value(name) for name in names]
        literals = ["".join(pair) for text in texts for pair in LITERAL.findall(text)]
        texts += [text.replace("\\n", "\n") for text in literals]
        if names:
            texts += ["user\n", "assistant\n", "system\n", "tool\n", "\n", "\n\n"]
        if any("strftime" in text or "date" in text for text in texts):
            words = [*calendar.month_name, *calendar.month_abbr, *calendar.day_name]
            words += [f"{number:02}" for number in range(60)]
            words += map(str, [*range(60), *range(2020, 2040)])
            texts += [f"{word} {word}" for word in words]
        return texts

    def vocabulary(self, template: Set[int]) -> Vocabulary:
        """Return what `choose` needs to know; `template` are the ids of the chat templates."""
        listed = np.isin(self.types, (CONTROL, USER_DEFINED, UNKNOWN, UNUSED)).tolist()
        reserved_names = {i for i, token in enumerate(self.tokens) if is_reserved(token)}
        looks = {i for i, token in enumerate(self.tokens) if LOOKS_SPECIAL.fullmatch(token)}
        special = {index for index in range(self.rows) if listed[index]} | looks | reserved_names
        bytes_ = set(np.flatnonzero(self.types == BYTE).tolist())
        reserved = set(np.flatnonzero(self.types == UNUSED).tolist()) | reserved_names
        ids = {token: index for index, token in enumerate(self.tokens)}
        basic = set(BYTE_OF_LETTER) if self.kind == "gpt2" else BYTE_TOKENS | {BLANK}
        named = (special - bytes_ - reserved) | {ids[token] for token in ("\n",) if token in ids}
        options = dict(tokens=dict(enumerate(self.tokens)), byte_level=self.kind == "gpt2")
        options["has_bytes"] = self.kind == "gpt2" or BYTE_TOKENS <= ids.keys()
        options["basic"] = bytes_ | {ids[token] for token in basic if token in ids}
        if self.kind in ("gpt2", "gemma4"):
            options["ranks"] = ranks_of(self._merges)
        elif self.kind in ("llama", "t5"):
            scores = self.file.fields[SCORES].value[: self.rows]
            options["scores"] = dict(enumerate(scores.tolist()))
            if self.kind == "t5":  # an unknown letter's score is computed from the lowest one
                named.add(int(np.where(self.types == NORMAL, scores, np.inf).argmin()))
                own = {NORMAL: scores, UNUSED: scores, USER_DEFINED: 0 * scores}
                types = enumerate(self.types.tolist())
                options["scores"] = {i: float(own[t][i]) for i, t in types if t in own}
        options["reasons"] = {"special": named, "chat template": template, "config": self.named}
        # a listed type is that of an added token; what only looks special is an ordinary one
        options["special"] = {index for index in special if listed[index]} | reserved
        return KINDS[self.kind](**options)

    @cached_property
    def _merges(self) -> list[tuple[str, str]]:
        """Return the two tokens of each merge: cut at the first blank after the first byte."""
        pairs = []
        for merge in self.file.fields[MERGES].value:
            at = merge.find(b" ", 1)
            pair = (merge[:at], merge[at + 1 :]) if at > 0 else (b"", b"")
            pairs.append(tuple(part.decode(errors="backslashreplace") for part in pair))
        return pairs

    def trimmed(self, kept: Sequence[int]) -> tuple[dict[str, Field], list[Tensor]]:
        """Return the fields and tensors of a file with the tokens `kept`, in this order."""
        rows, new_ids = np.array(kept), {old: new for new, old in enumerate(kept)}
        fields: dict[str, Field] = {}
        for name, field in self.file.fields.items():
            value = field.value
            if name in self.dropped or LEFT_OUT.fullmatch(name):
                continue
            if name == TOKENS:
                value = [self.raw[index] for index in kept]
            elif name in (SCORES, TYPES):
                value = value[rows]
            elif name == MERGES:
                texts = {self.tokens[index] for index in kept}
                merges = zip(value, self._merges, strict=True)
                value = [m for m, (a, b) in merges if {a, b, a + b} <= texts]
            elif ID_FIELDS.fullmatch(name):
                if np.ndim(value):
                    value = [new_ids.get(i, i) for i in value.tolist() if i in new_ids or i < 0]
                elif value not in new_ids:  # beyond all tokens, so llama.cpp ignores it
                    continue
            elif COUNTS.fullmatch(name):
                value = len(kept)
            elif name == "general.name":
                value += b" (trimmed vocabulary)"
            elif name == "general.size_label":
                value += b"-trimmed"
            fields[name] = field if value is field.value else replace(field, value=value, raw=b"")
        for name, index in self.ids.items():
            field = fields.get(name, Field(UINT32, 0))
            fields[name] = replace(field, value=new_ids[index], raw=b"")
        fields["langprune.vocabulary.digest"] = Field(STRING, self.digest(kept).encode())
        fields["langprune.vocabulary.rows_before"] = Field(UINT32, self.rows)
        tensors = [
            replace(tensor, kept=rows) if TABLES.fullmatch(tensor.name) else tensor
            for tensor in self.file.tensors
        ]
        return fields, tensors

    def digest(self, kept: Sequence[int]) -> str:
        """Return a digest of the texts of the tokens `kept`."""
        texts = b"\0".join(self.raw[index] for index in kept)
        return hashlib.sha256(texts).hexdigest()[:16]


def tokenizer_model(fields: dict[str, Field]) -> tuple[dict[str, Field], list[Tensor]]:
    """Return a model of one block of zeros with the tokenizer of `fields`.

    llama.cpp loads it whatever the size and architecture of the file, and splits text as with it.
    """
    rows, width = len(fields[TOKENS].value), 32
    counts = dict(context_length=512, embedding_length=width, feed_forward_length=width)
    counts |= {"block_count": 1, "attention.head_count": 1, "rope.dimension_count": width}
    made = {"general.architecture": Field(STRING, b"llama")}
    made |= {f"llama.{name}": Field(UINT32, count) for name, count in counts.items()}
    made["llama.attention.layer_norm_rms_epsilon"] = Field(6, 1e-5)
    made |= {name: field for name, field in fields.items() if name.startswith("tokenizer.")}
    shapes = {"token_embd": (width, rows), "output_norm": (width,)}
    parts = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
    shapes |= {f"blk.0.{part}": (width, width) for part in parts}
    shapes |= {f"blk.0.{part}": (width,) for part in ("attn_norm", "ffn_norm")}
    tensors = []
    for name, shape in shapes.items():
        is_table = name == "token_embd"  # of 16 bits, others of 32
        data = np.zeros(int(np.prod(shape)) * (2 if is_table else 4), np.uint8)
        tensors.append(Tensor(f"{name}.weight", shape, int(is_table), data))
    return made, tensors
