"""Continues a prompt, or many at once, with the newest parameters of a run, on any mesh.

python generate.py --workdir=runs/mine --prompt="Once" --max_tokens=100
python generate.py --workdir=runs/base --prompts=questions.txt --temperature=0 --simulate=6 --config.mesh.tensor=3 --config.mesh.fsdp=2
python generate.py --workdir=runs/mine --prompt="def " --samples=4 --top_p=0.9 --seed=1

With one prompt its text appears as it is made. An answer is a function of its prompt and seed: what else runs does not
change a bit of it.
"""

if __name__ == "__main__":
    from runtime import early

    early.end_at_ctrl_c()

import json
import queue
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from runtime import exits, usage
from runtime.config import UsageError, bad_input
from serving import loaded
from serving.requests import End, Request, Sampling
