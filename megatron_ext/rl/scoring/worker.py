"""The process that runs a user's reward: `python -m megatron_ext.rl.scoring.worker SOCKET_FD ALARM_S MEMORY_BYTES PATH`. Started by `pool.py` only.

    worker -> ("ready",) or ("unusable", where, problem, remedy)
    pool   -> (prompt, texts)
    worker -> ("scored", reward, parts) or ("failed", reason, detail), one message a text, in order

It imports no torch. A reward that hangs is killed by the pool; should the pool be gone, the kernel ends this process at the alarm. A child that a reward forked
and that comes back from it ends here: it would answer a second time.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from multiprocessing.connection import Connection

from megatron_ext.batch.rollout import Prompt
from megatron_ext.data.rewards import BadReward, RewardFunction, load_reward, read_reward
from megatron_ext.errors import UserError

DETAIL_CHARACTERS = 2000


def main() -> None:
    descriptor, alarm_s, memory_bytes, path = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    os.set_inheritable(descriptor, False)
    connection, ourselves = Connection(descriptor), os.getpid()
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        reward = load_reward(path)
    except UserError as error:
        connection.send(("unusable", error.where, error.problem, error.remedy))
        return
    connection.send(("ready",))
    while True:
        try:
            prompt, texts = connection.recv()
        except EOFError:
            return
        for text in texts:
            signal.setitimer(signal.ITIMER_REAL, alarm_s)
            reply = score(reward, prompt, text)
            if os.getpid() != ourselves:
                os._exit(0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(reply)


def score(reward: RewardFunction, prompt: Prompt, text: str) -> tuple[object, ...]:
    """The reply for one text. Whatever the reward raises, even SystemExit, is a failure of this text alone."""
    try:
        value, parts = read_reward(reward(prompt, text))
    except BadReward as error:
        return ("failed", error.reason, error.detail)
    except BaseException:
        return ("failed", "reward_raised", traceback.format_exc()[-DETAIL_CHARACTERS:])
    return ("scored", value, parts)


if __name__ == "__main__":
    main()
