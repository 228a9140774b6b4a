"""What it costs to hand a step's rollouts to every rank, apart from the network.

    python tools/bench_exchange.py [--rollouts 512] [--tokens 4096] [--rounds 5]

Prints a Markdown table with the processor's seconds (the least of all rounds), so that other programs do not disturb:
the first rank encodes, the others decode. The rollouts come back bit for bit.
"""

import argparse
import random
import time
from collections.abc import Callable
from typing import TypeVar

from megatron_tip.records import Rollout, logprobs, token_ids
from megatron_tip.rollout.codec import decode_rollouts, encode_rollouts

PROMPT_TOKENS = 256
VOCAB_SIZE = 151_936

T = TypeVar("T")


def make_rollouts(num_rollouts: int, num_tokens: int) -> list[Rollout]:
    draw = random.Random(1)
    return [
        Rollout(
            prompt_index=place,
            sample_index=0,
            prompt_ids=token_ids(draw.choices(range(VOCAB_SIZE), k=PROMPT_TOKENS)),
            response_ids=token_ids(draw.choices(range(VOCAB_SIZE), k=num_tokens)),
            rollout_logprobs=logprobs(-draw.expovariate(1.0) for _ in range(num_tokens)),
            finish_reason="length",
            weight_version=0,
        )
        for place in range(num_rollouts)
    ]


def least_seconds(action: Callable[[], T], rounds: int) -> tuple[float, T]:
    """Returns the processor's seconds of the fastest round, and the last result."""
    result, seconds = action(), []
    for _ in range(rounds):
        start = time.process_time()
        result = action()
        seconds.append(time.process_time() - start)
    return min(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rollouts = make_rollouts(arguments.rollouts, arguments.tokens)
    encoding, content = least_seconds(lambda: encode_rollouts(rollouts), arguments.rounds)
    decoding, decoded = least_seconds(lambda: decode_rollouts(content), arguments.rounds)
    assert decoded == rollouts, "bit for bit"
    print(
        f"{arguments.rollouts} rollouts of {PROMPT_TOKENS} + {arguments.tokens} tokens, {len(content) / 1e6:.0f} MB\n"
    )
    print("| | Processor, s |\n|---|---|")
    print(f"| encode, on the first rank | {encoding:.3f} |")
    print(f"| decode, on every other rank | {decoding:.3f} |")


if __name__ == "__main__":
    main()
