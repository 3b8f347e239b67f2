"""Cut a model into a pipeline over two workers of this machine, GPUs if there are two, and generate text with it.

python examples/two_workers.py [MODEL]
"""

import sys

from transformers import AutoTokenizer

from bigint8 import Workload, open_pipeline

PROMPT = "The capital of France is"


def main(name: str) -> None:
    with open_pipeline(name, gpus=2, workload=Workload(context=512)) as pipeline:
        for stage in pipeline.plan.stages:
            print(f"stage {stage.index} on {stage.device.name}: blocks {stage.first_block} to {stage.last_block - 1}")
        tokenizer = AutoTokenizer.from_pretrained(pipeline.plan.spec.folder)
        output = pipeline.model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=16, do_sample=False)
        print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
