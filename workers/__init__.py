"""What runs on a cluster: the Ray pool, the stages' workers, the trainer."""

import os
import sys

# A process that speaks to a dead raylet is ended by Ray at once, without a word, where RAY_RAYLET_PID names a process that is
# gone, or where that is unset and its parent is init: so ends a flow whose Prefect worker was killed or is a container's first
# process. Ray sets it for its own workers; the process that starts or joins a Ray names itself, and goes on (ray_session.py).
# It is read when Ray is imported.
# And a call of Ray before ray_session.py has begun one would start another, with defaults of its own; so it is an error instead.
if "ray" not in sys.modules:
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
