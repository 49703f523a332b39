"""Other libraries' distillation, as trainings that `distillation_speed.py` runs step by step.

TextBrewer 0.2.1 (its last release) and TRL's GKD, the off-policy part. What they import is no dependency of ours:

    pip install --no-deps --target FOLDER textbrewer tensorboard protobuf absl-py trl    # and FOLDER on PYTHONPATH
"""

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.distillation.batches import Head, Row, collate

Training = Callable[[], object]


def trainings(
    head: Head,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    *,
    batch: int,
    steps: int,
) -> dict[str, Training]:
    """Return the trainings of those that are installed and have this head; each works on its own copy of the student.

    The loss is KL divergence and, but for TRL, which has none, half of the labels' cross-entropy.
    """
    found: dict[str, Training] = {}
    if importlib.util.find_spec("textbrewer") and head == "classification":
        found["TextBrewer"] = partial(_textbrewer, head, copy.deepcopy(student), teacher, rows, batch, steps)
    if importlib.util.find_spec("trl") and head == "causal_lm":
        found["TRL GKD"] = partial(_trl, head, copy.deepcopy(student), teacher, tokenizer, rows, batch, steps)
    return found


def _textbrewer(
    head: Head, student: PreTrainedModel, teacher: PreTrainedModel, rows: list[Row], batch: int, steps: int
) -> None:
    import textbrewer

    def adapt(_: dict, outputs: object) -> dict:
        return {"logits": outputs.logits, "losses": outputs.loss}

    loader = DataLoader(rows, batch_size=batch, shuffle=True, drop_last=True, collate_fn=partial(collate, head, pad=0))
    with tempfile.TemporaryDirectory() as folder:
        distiller = textbrewer.GeneralDistiller(
            train_config=textbrewer.TrainingConfig(output_dir=folder, device="cpu", ckpt_steps=10 * steps),
            distill_config=textbrewer.DistillationConfig(temperature=2, kd_loss_weight=0.5, hard_label_weight=0.5),
            model_T=teacher,
            model_S=student.train(),
            adaptor_T=adapt,
            adaptor_S=adapt,
        )
        with distiller:
            optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.01)
            distiller.train(optimizer, loader, num_steps=steps, max_grad_norm=1.0)


def _trl(
    head: Head,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    batch: int,
    steps: int,
) -> None:
    import datasets
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    with tempfile.TemporaryDirectory() as folder:
        GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=GKDConfig(
                output_dir=folder,
                lmbda=0.0,
                beta=0.0,
                temperature=1.0,
                max_steps=steps,
                per_device_train_batch_size=batch,
                learning_rate=1e-5,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            data_collator=partial(collate, head, pad=0),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        ).train()
