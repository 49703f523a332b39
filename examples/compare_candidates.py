"""Several candidates against the base: quality, size and speed, measured alike, in one table and one HTML report."""

import llmcompress as lc
from llmcompress.testing import tiny_model, tiny_tokenizer

# Yours: a fine-tuned AutoModelForSequenceClassification, its AutoTokenizer, and some hundred labelled test texts. The
# model here is untrained and the texts are four: the table shows the form, and says itself how little it can tell.
model, tokenizer = tiny_model("bert"), tiny_tokenizer()
test = [("a fine film", 1), ("what a bore", 0), ("warm and wise", 1), ("no idea at all", 0)]

candidates = {
    "base": model,
    "int8": lc.compress(model, lc.DynamicQuantization()),
    "half FFN": lc.compress(model, lc.StructuredPruning(ffn=0.5)),
}
# Rows and tokens of the batches to time: those of your service. A model as tiny as this one gains no speed.
comparison = lc.compare(candidates, lc.TextClassification(test), tokenizer=tokenizer, latency=[(1, 16)])
print(comparison)

int8 = comparison["int8"].change  # every number of the table is a field
print(f"int8: {int8.smaller_on_disk:.2f}x smaller, {int8.flips[0].agreement:.0%} of the predictions as before")
comparison.save("report.html")  # one self-contained page; .md and .json are written as well
