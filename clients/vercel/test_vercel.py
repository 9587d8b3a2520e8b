"""Runs the tests of the AI SDK (vercel.test.mjs), which node finds packages for only beside them."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

from cluster import NAME, PATIENCE


def test_the_ai_sdk(cluster):
    place = pathlib.Path(sys.prefix) / "node"
    shutil.copy(pathlib.Path(__file__).with_name("vercel.test.mjs"), place)
    told = {"MILLRACE_URL": cluster.url + "/v1", "MILLRACE_KEY": cluster.key, "MILLRACE_MODEL": NAME}
    done = subprocess.run(["node", "--test", "--test-reporter=tap", "vercel.test.mjs"], cwd=place, env={**os.environ, **told},
                          capture_output=True, text=True, timeout=4 * PATIENCE)
    print(done.stdout)
    counts = dict(re.findall(r"^# (pass|fail|skipped) (\d+)$", done.stdout, re.M))
    assert done.returncode == 0 and counts == {"pass": "15", "fail": "0", "skipped": "0"}, done.stdout
