"""Cut a model into a pipeline over two workers of this machine, GPUs if there are two, and generate text with it.

python examples/two_workers.py [MODEL]
"""

import sys

from transformers import AutoTokenizer

from bigint8.checkpoint.headers import open_checkpoint
from bigint8.families.table import layout_of
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import pick_dtype
from bigint8.run.pipeline import Pipeline
from bigint8.sources.find import find_source

PROMPT = "The capital of France is"


def main(name: str) -> None:
    source = find_source(name)
    if source.folder is None:
        raise source.not_found()
    with Pipeline(workers=2) as pipeline:
        devices = pipeline.devices()
        dtype = pick_dtype("auto", stored_dtype(open_checkpoint(source.folder)), devices)
        plan = make_plan(name, layout_of(source.config()), devices, dtype, context=512)
        for stage in plan.stages:
            print(f"stage {stage.index} on {stage.device.name}: blocks {stage.first_block} to {stage.last_block - 1}")
        pipeline.load(source.folder, plan)
        model = pipeline.model(source.folder, plan)
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        output = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=16, do_sample=False)
        print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
