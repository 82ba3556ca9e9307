"""What a checkpoint costs: the loop while it is taken, the disk until it is durable, memory, and the way back.

``python -m benchmarks.saving [what ...] [--mib 1024] [--rounds 7]`` prints each figure as a ratio to what the machine
can do at best with the same bytes, and to other tools, measured in the same process, in turns and in random order, its
bound beside it. The state is changed in every step, and a figure counts only if what comes back is, bit by bit, the
state of the one step that the checkpoint names. The number before a line is that of the promise it belongs to.

It ends with exit status 0 if all is within bounds, 1 if something is over, 2 if a checkpoint was false, and 3 if the
disk was not steady, in which case nothing is known.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.figures import Figures, Report, in_random_order, steadily
from benchmarks.saving_cuda import cuda
from benchmarks.saving_frozen import frozen
from benchmarks.saving_growth import growth
from benchmarks.saving_limits import Limits
from benchmarks.saving_loops import Loop, compute_bound, memory_bound, time_lost
from benchmarks.saving_memory import memory
from benchmarks.saving_ours import Supervised
from benchmarks.saving_peers import Peer, available
from benchmarks.saving_state import FalseFigureError, State

FALSE = 2
