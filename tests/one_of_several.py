"""One process of several, started by runtime.launch: 20 losses and the first gradients, uneven masks, as an .npz.

python -m runtime.launch --processes=2 -- tests/one_of_several.py OUT.npz REPLICA,FSDP,TENSOR
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import helpers
import jax
import numpy as np

from parallel.layout import mesh as meshes
from runtime import agree

parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("mesh", type=lambda text: tuple(map(int, text.split(","))))
parser.add_argument("--coordinator")
parser.add_argument("--num_processes", type=int)
parser.add_argument("--process_id", type=int)
args = parser.parse_args()

meshes.simulate(math.prod(args.mesh), args.num_processes)
agree.start_distributed(args.coordinator, args.num_processes, args.process_id)
config = helpers.tiny()
parts = helpers.build(config, args.mesh)
losses = helpers.losses(config, parts, 20, uneven=True)
gradients = helpers.first_gradients(config, parts, uneven=True)
if jax.process_index() == 0:
    np.savez(args.out, losses=losses, **gradients)
agree.leave()
