"""All scenes of a Supervisor, played in one mode: ``programs_supervisor.py MODE [SCENE]``."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import scenes_construction  # noqa: F401
import scenes_endings  # noqa: F401
import scenes_services  # noqa: F401
from parity import main

if __name__ == "__main__":
    main()
