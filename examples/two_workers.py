"""Cut a model into a pipeline over two workers of this machine, GPUs if there are two, and generate text with it.

python examples/two_workers.py [MODEL]
"""

import sys

from bigint8 import Workload, open_pipeline

PROMPTS = ["The capital of France is Paris. The capital of Italy is", "Two and two are"]


def main(name: str) -> None:
    with open_pipeline(name, gpus=2, workload=Workload(context=512, sequences=2)) as pipe:
        for stage in pipe.plan.stages:
            print(f"stage {stage.index} on {stage.device.name}: blocks {stage.first_block} to {stage.last_block - 1}")
        pipe.read_text(raw=True)  # continue the prompts as they are, also where the model has a chat template
        for prompt, answer in zip(PROMPTS, pipe.generate(PROMPTS, max_new_tokens=16, do_sample=False), strict=True):
            print(f"{prompt}{answer.text}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
