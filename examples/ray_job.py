"""Generate text on the Ray cluster that this script runs in; made to be submitted as a job.

ray job submit --address http://HEAD:8265 -- python /path/on/the/head/ray_job.py [MODEL] [WORKERS]

The model's folder must be readable under the same path on every node of the cluster.
"""

import sys

from bigint8 import Cluster, Workload, open_pipeline

PROMPT = "The capital of France is"


def main(name: str, workers: int) -> None:
    there = Cluster(address="auto")
    with open_pipeline(name, workers, workload=Workload(context=512), cluster=there, progress=False) as pipe:
        pipe.read_text(raw=True)  # continue the prompt as it is
        (answer,) = pipe.generate(PROMPT, max_new_tokens=16, do_sample=False)
        print(f"{len(pipe.plan.stages)} workers: {PROMPT}{answer.text}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", int(sys.argv[2]) if len(sys.argv) > 2 else 2)
