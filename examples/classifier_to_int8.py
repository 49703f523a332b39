"""A BERT classifier in int8: compress, save, and read it back with plain transformers."""

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import llmcompress as lc
from llmcompress.testing import tiny_model, tiny_tokenizer

# Yours: AutoModelForSequenceClassification.from_pretrained(...) and AutoTokenizer.from_pretrained(...). The model here
# is tiny and untrained: what it prints shows the form, not what int8 gains.
model, tokenizer = tiny_model("bert"), tiny_tokenizer()

result = lc.compress(model, lc.DynamicQuantization(), tokenizer=tokenizer)
print(result)  # a table: parameters, zeros, bytes on disk and in memory, what was touched, what was left and why
folder = result.save_pretrained("int8-classifier")

# Any process that has imported llmcompress reads the folder; the code that uses the model stays as it was.
again = AutoModelForSequenceClassification.from_pretrained(folder)
inputs = AutoTokenizer.from_pretrained(folder)("a quiet film", return_tensors="pt")
with torch.inference_mode():
    same = torch.equal(again(**inputs).logits, result.model(**inputs).logits)
print(f"read back from {folder}: logits {'equal' if same else 'DIFFERENT'}")
