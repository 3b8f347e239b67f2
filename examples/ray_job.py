"""Generate text on the Ray cluster that this script runs in; made to be submitted as a job.

ray job submit --address http://HEAD:8265 -- python /path/on/the/head/ray_job.py [MODEL] [WORKERS]

The model's folder must be readable under the same path on every node of the cluster.
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


def main(name: str, workers: int) -> None:
    source = find_source(name)
    if source.folder is None:
        raise source.not_found()
    with Pipeline(workers, address="auto") as pipeline:
        devices = pipeline.devices()
        dtype = pick_dtype("auto", stored_dtype(open_checkpoint(source.folder)), devices)
        plan = make_plan(name, layout_of(source.config()), devices, dtype, context=512)
        pipeline.load(source.folder, plan, progress=False)
        model = pipeline.model(source.folder, plan)
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        output = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=16, do_sample=False)
        print(f"{len(plan.stages)} workers: {tokenizer.decode(output[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", int(sys.argv[2]) if len(sys.argv) > 2 else 2)
