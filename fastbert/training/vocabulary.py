"""A WordPiece vocabulary learnt from a corpus (Devlin et al., arXiv:1810.04805, section 3)."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Rarer letters are unknown. The multilingual checkpoints know about as many.
_LETTERS = 10_000


def learn(texts: Sequence[str], vocab_size: int, max_length: int, lowercase: bool = True) -> BertTokenizer:
    """A BERT tokenizer with about ``vocab_size`` pieces; fewer where the texts have no more to give.

    Chinese characters are words of their own, as in the multilingual checkpoints. ``lowercase`` also strips accents.
    The same texts give the same vocabulary.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer meets letters in an order that is another every time, and breaks ties between pieces by it. Given as
    # tokens that are there before, they have one order.
    letters = _letters(texts, tokenizer)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *letters], limit_alphabet=_LETTERS, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=lowercase, model_max_length=max_length)


def _letters(texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """The letters of the texts, sorted, as they begin a word and as they go on one."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    commonest = sorted(counts, key=lambda letter: (-counts[letter], letter))[:_LETTERS]
    # Marks and Chinese characters stand alone, between spaces too.
    words = [tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(x + x)) for x in commonest]
    begin = sorted(letter for letter, found in zip(commonest, words, strict=True) if found)
    go_on = sorted(f"##{letter}" for letter, found in zip(commonest, words, strict=True) if len(found) == 1)
    return [*begin, *go_on]
