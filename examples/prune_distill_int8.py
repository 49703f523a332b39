"""A chain: half of the feed-forward channels go, the original teaches what is left, and int8 comes last."""

import llmcompress as lc
from llmcompress.testing import tiny_model, tiny_tokenizer

# Yours: a fine-tuned AutoModelForSequenceClassification, its AutoTokenizer, and the data it was fine-tuned on: a list
# of (text, label), a .csv, .tsv or .jsonl file, a datasets.Dataset, or the name of a data set on the hub. The model
# here is tiny and untrained, and two texts test it: its numbers show the form.
model, tokenizer = tiny_model("bert"), tiny_tokenizer()
train = [("a fine film", 1), ("what a bore", 0), ("warm and wise", 1), ("no idea at all", 0)] * 4
test = [("fine and warm", 1), ("a bore", 0)]

result = lc.compress(
    model,
    [
        lc.StructuredPruning(ffn=0.5),
        # The teacher is the untouched `model`.
        lc.KnowledgeDistillation(epochs=2, features={"hidden": 1.0}, max_length=16),
        lc.DynamicQuantization(),
    ],
    data=train,
    tokenizer=tokenizer,
    task=lc.TextClassification(test),  # scored before the first step and after each
    resume_dir="stages",  # a run that was killed continues behind its last finished step
)
print(result)
result.save_pretrained("small-classifier")
