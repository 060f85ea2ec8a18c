"""Hugging Face Trainer: a thin adapter writes a task vector into every checkpoint folder.

pip install transformers accelerate
python examples/hugging_face_trainer.py --folder runs/hugging_face
"""

import argparse
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from tva import TaskVector, open_weights
from tva.vectors.task_vector import Origin


class TaskVectors(TrainerCallback):
    """Keep the base when training starts, and take a vector whenever the Trainer saves."""

    def __init__(self, task: str | None = None) -> None:
        self.task = task

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        base = Path(args.output_dir) / "base"
        if state.is_world_process_zero and state.global_step == 0:
            model.save_pretrained(base)  # saved like checkpoints, so that the names are equal
        if not base.exists():
            raise FileNotFoundError(f"The base of this resumed run was expected at {base}. Put it back there.")

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        origin = Origin(task=self.task, step=state.global_step)
        vector = TaskVector.between(open_weights(Path(args.output_dir) / "base"), open_weights(folder), origin=origin)
        vector.save(folder / "task_vector.tv.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/hugging_face"))
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=2, **sizes))
    words = torch.randint(1, 50, (32, 6))
    data = [{"input_ids": ids, "labels": int(ids[0] < 25)} for ids in words]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        save_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[TaskVectors("first word")]).train()
    print(TaskVector.load(folder / "checkpoint-8/task_vector.tv.safetensors"))


if __name__ == "__main__":
    main()
