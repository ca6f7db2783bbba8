"""A WordPiece vocabulary learnt from a corpus (Devlin et al., arXiv:1810.04805, section 3)."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def learn(texts: Iterable[str], vocab_size: int, max_length: int, lowercase: bool = True) -> BertTokenizer:
    """A BERT tokenizer with at most ``vocab_size`` pieces; fewer where the texts have no more to give.

    Chinese characters are words of their own, as in the multilingual checkpoints. ``lowercase`` also strips accents.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # Its pieces in the order of their ids: by frequency after the letters, as the trainer found them.
    vocabulary = tokenizer.get_vocab()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return BertTokenizer(vocab=vocabulary, do_lower_case=lowercase, model_max_length=max_length)
