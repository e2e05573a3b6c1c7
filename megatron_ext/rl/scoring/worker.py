"""The process that runs a user's reward or environment: `python -m megatron_ext.rl.scoring.worker SOCKET_FD ALARM_S MEMORY_BYTES KIND PATH`. Started by
`process.py` only.

    worker -> ("ready",) or ("unusable", where, problem, remedy)
    pool   -> (prompt, subjects)                                    texts to reward, or the turns of conversations to go on with
    worker -> ("done", result...) or ("failed", reason, detail), one message a subject, in order

It imports no torch. A function that hangs is killed by the pool; should the pool be gone, the kernel ends this process at the alarm. A child that it forked
and that comes back from it ends here: it would answer a second time.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from megatron_ext.batch.rollout import Prompt
from megatron_ext.data.rewards import BadReward, load_reward, read_reward
from megatron_ext.errors import UserError

DETAIL_CHARACTERS = 2000
Work = Callable[[Prompt, object], tuple[object, ...]]


def main() -> None:
    descriptor, alarm_s, memory_bytes, kind, path = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    os.set_inheritable(descriptor, False)
    connection, ourselves = Connection(descriptor), os.getpid()
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        work = _work(kind, path)
    except UserError as error:
        connection.send(("unusable", error.where, error.problem, error.remedy))
        return
    connection.send(("ready",))
    while True:
        try:
            prompt, subjects = connection.recv()
        except EOFError:
            return
        for subject in subjects:
            signal.setitimer(signal.ITIMER_REAL, alarm_s)
            reply = _tried(work, kind, prompt, subject)
            if os.getpid() != ourselves:
                os._exit(0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(reply)


def _work(kind: str, path: str) -> Work:
    if kind == "environment":
        from megatron_ext.rl.environments import load_environment, read_observation

        act = load_environment(path)
        return lambda prompt, turns: ("done", read_observation(act(prompt, turns), prompt))  # type: ignore[arg-type]
    reward = load_reward(path)
    return lambda prompt, text: ("done", *read_reward(reward(prompt, str(text))))


def _tried(work: Work, kind: str, prompt: Prompt, subject: object) -> tuple[object, ...]:
    """The reply for one subject. Whatever the function raises, even SystemExit, is a failure of this subject alone."""
    try:
        return work(prompt, subject)
    except BadReward as error:
        return ("failed", error.reason, error.detail)
    except BaseException:
        return ("failed", f"{kind}_raised", traceback.format_exc()[-DETAIL_CHARACTERS:])


if __name__ == "__main__":
    main()
