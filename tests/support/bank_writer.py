"""A process that fills a bank until something ends it: `python -m tests.support.bank_writer FOLDER ANSWERS [FILE_BYTES]`. It says the number of every draw that
`put` has returned for. FILE_BYTES: the most that a file of it may hold (RLIMIT_FSIZE)."""

from __future__ import annotations

import resource
import sys
from itertools import count
from pathlib import Path

from megatron_ext.errors import StorageError
from megatron_ext.rl.bank.bank import open_bank
from tests.support.rollouts import group

KEYS = "ab"


def answers_of(draw, samples):
    return [answer for key in KEYS for answer in group(f"{key}{draw}", samples, length=40)]


def main():
    folder, samples = Path(sys.argv[1]), int(sys.argv[2])
    bank = open_bank(folder)
    if len(sys.argv) > 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
    for draw in count():
        try:
            bank.put(draw, answers_of(draw, samples), [])
        except StorageError as error:
            print(error, flush=True)
            return
        print(draw, flush=True)


if __name__ == "__main__":
    main()
