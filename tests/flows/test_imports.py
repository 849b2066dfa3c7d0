"""What a flow's process loads when it begins: every stage's start waits for it, and every run holds it in memory."""

import json
import subprocess
import sys

LOADED = """
import json, sys
from pathlib import Path
import flows.pipeline
tops = sorted({name.partition(".")[0] for name in sys.modules})
most = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps([tops, int(most.split()[1]) / 1024]))
"""
OF_WORKERS = {
    "torch",
    "torchvision",
    "deepspeed",
    "diffusers",
    "transformers",
    "tokenizers",
    "scipy",
    "matplotlib",
    "boto3",
}


def test_a_flows_process_loads_no_library_that_only_workers_need():
    said = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True).stdout
    loaded, megabytes = json.loads(said.splitlines()[-1])
    assert {"prefect", "ray", "pyarrow", "PIL", "workers", "sd3core"} <= set(loaded)
    assert OF_WORKERS.isdisjoint(loaded)
    assert megabytes < 250  # 180 here; a second run of an ingest of 1,000,000 files adds 70, and is to stay below 300
