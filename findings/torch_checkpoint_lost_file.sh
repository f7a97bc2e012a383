#!/usr/bin/env bash
# torch.distributed.checkpoint loads a folder of safetensors from which a file is lost, and leaves those rows as they were.
#
# Guess: a checkpoint whose shards are not all there is refused: other storages of the same library keep metadata that
# says which there must be, and a tensor that is missing as a whole is an error.
# Seen: what HuggingFaceStorageWriter(save_distributed=True) writes has no such metadata. HuggingFaceStorageReader takes
# the furthest end of all shards that it finds for the size of a tensor, and the planner asks for what overlaps. When
# the file of rank 0 is lost, the size is right, and the rows of rank 0 keep what was in memory: no error, no warning.
# When that of the last rank is lost, the size is too small, and it is refused.
# With: torch 2.14.1, safetensors 0.8.0.
#
# Output:
#   torch 2.14.1
#   all files: [0.0, 1.0, 2.0, 3.0]
#   without that of rank 0: [7.0, 7.0, 2.0, 3.0]
#   without that of rank 1: CheckpointException
set -euo pipefail
room="$(mktemp -d)"
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 safetensors==0.8.0 numpy==2.4.6
cd "$room"
cat >save.py <<'PYTHON'
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

mesh = init_device_mesh("cpu", (2,))
rows = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
dcp.save({"rows": rows}, storage_writer=dcp.HuggingFaceStorageWriter("saved", save_distributed=True))
dist.destroy_process_group()
PYTHON
"$room/venv/bin/python" -m torch.distributed.run --nproc-per-node 2 --master-port 29471 save.py 2>/dev/null
"$room/venv/bin/python" - 2>/dev/null <<'EOF'
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

print("torch", torch.__version__.partition("+")[0])


def load(folder):
    state = {"rows": torch.full((4,), 7.0)}
    try:
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(folder), no_dist=True)
    except dcp.CheckpointException as error:
        return type(error).__name__
    return state["rows"].tolist()


whole = load("saved")
found = []
files = sorted(Path("saved").glob("*.safetensors"))
for rank, file in enumerate(files):
    shutil.copytree("saved", f"without{rank}")
    Path(f"without{rank}", file.name).unlink()
    found.append(load(f"without{rank}"))
print("all files:", whole)
for rank, result in enumerate(found):
    print(f"without that of rank {rank}:", result)
assert whole == [0, 1, 2, 3]
assert found == [[7, 7, 2, 3], "CheckpointException"]
EOF
