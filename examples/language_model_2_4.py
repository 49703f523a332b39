"""A causal language model: 2 of every 4 weights become zero, and perplexity tells what that costs."""

import llmcompress as lc
from llmcompress.testing import tiny_model, tiny_tokenizer

# Yours: AutoModelForCausalLM.from_pretrained(...), its AutoTokenizer, and a text of the kind the model will see. The
# model here is tiny and untrained: zeros cost it nothing, and may even lower its perplexity.
model, tokenizer = tiny_model("llama"), tiny_tokenizer()
texts = ["Once upon a time there was a very small model.", "It had few weights, and half of them were zero."] * 4

task = lc.LanguageModeling(texts, window=64, stride=32)
result = lc.compress(model, lc.MagnitudePruning(pattern="2:4"), tokenizer=tokenizer)
print(result)  # the report says it: zeros in dense tensors are neither smaller on disk nor faster

before = lc.evaluate(model, task, tokenizer=tokenizer, latency=False).score
after = lc.evaluate(result.model, task, tokenizer=tokenizer, latency=False).score
for name, score in (("dense", before), ("2:4", after)):
    print(f"{name:<6} perplexity {score.value:.2f}, {score.metrics['bits_per_byte']:.3f} bits a byte")
print(after.protocol)  # windows, stride, BOS policy, tokens scored, and a hash of the text
