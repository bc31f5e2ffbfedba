"""A folder on a disk that is full."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa3_convert.bundle.reader import Bundle

SMALL = """
import json, os, subprocess, sys, time, urllib.error, urllib.request
command, bundle, out = sys.argv[1:]
process = subprocess.Popen([sys.executable, "-m", "sa3_convert", "serve", bundle, "-o", out, "--port", "0"],
                           stderr=subprocess.PIPE, text=True)
address = next(line for line in process.stderr if line.startswith("Open ")).split()[1]
def ask(path, body=None):
    try:
        return json.load(urllib.request.urlopen(address + path, body))
    except urllib.error.HTTPError as error:
        return json.load(error)
def made(seconds):
    job = ask("v1/generate", json.dumps({"prompt": "pad", "seconds": seconds, "steps": 1}).encode())["id"]
    while (told := ask("v1/jobs/" + job))["state"] in ("queued", "running"):
        time.sleep(0.05)
    return [told["state"], told["sentence"]]
told = [made(1), made(20), ask("v1/audio", bytes(2 << 20))["detail"], made(1)]
process.terminate()
process.wait()
left = [name for folder, _, names in os.walk(out) for name in names if not name.endswith((".wav", ".json"))]
print(json.dumps([*told, left]))
"""


def test_a_full_disk_fails_what_does_not_fit_in_a_sentence_and_nothing_else(toy_int8: Bundle, tmp_path: Path) -> None:
    small = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"', str(tmp_path)]
    try:
        subprocess.run([*small, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"No small file system can be made here: {error}.")
    command = [*small, sys.executable, "-c", SMALL, "serve", str(toy_int8.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"no_proxy": "*"})
    assert done.returncode == 0, done.stderr
    before, large, upload, after, left = json.loads(done.stdout)
    assert before == after == ["done", None]
    assert large[0] == "failed"
    assert "No space left on device" in large[1]
    assert "The disk is full" in upload
    assert left == []
