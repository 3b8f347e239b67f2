"""Serve many requests of asyncio tasks at once: they join and leave while others run, and each streams its answer.

python examples/many_requests.py [MODEL]
"""

import asyncio
import sys

from bigint8 import Workload, open_pipeline

QUESTIONS = ["Name three colours.", "What is a prime number?", "Write a line about the sea.", "Who wrote Hamlet?"]


async def ask(pipe, number: int, question: str) -> None:
    await asyncio.sleep(number * 0.1)  # they do not all come at once
    pieces = [piece async for piece in pipe.astream(question, max_new_tokens=24, do_sample=False)]
    print(f"> {question}\n{''.join(pieces)}\n")


async def main(name: str) -> None:
    with open_pipeline(name, workload=Workload(context=512, sequences=4), progress=False) as pipe:
        await asyncio.gather(*(ask(pipe, number, question) for number, question in enumerate(QUESTIONS)))
        stats = pipe.stats()
        print(f"{stats.tokens} tokens, {stats.tokens_per_s:.1f} a second; stages busy {stats.busy}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"))
