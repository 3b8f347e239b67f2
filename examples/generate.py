"""Load a model in int8 and generate text with it, all in this process.

python examples/generate.py [MODEL]
"""

import sys

from transformers import AutoTokenizer

from bigint8 import load_sharded_int8

PROMPT = "The capital of France is"

name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"  # a preset, a folder or a hub id
model = load_sharded_int8(name, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)

inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
