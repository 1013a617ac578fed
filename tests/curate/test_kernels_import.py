import subprocess
import sys

PROGRAM = """
import sys
for name in ("polars", "faiss", "open_clip", "datasets", "pyarrow", "ray", "sklearn", "scipy"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np
from curate import complexity, dedup, kmeans, prune

x = np.eye(4, dtype=np.float16)[[0, 0, 1, 2, 3, 3]]
found = kmeans.fit(x, 2, device="cpu")
cluster, distance = kmeans.assign(x, found.centroids, device="cpu")
clusters = kmeans.Clusters(cluster, distance, found.centroids)
assert complexity.complexity(clusters).complexity.shape == (2,)
assert (dedup.find_duplicates(x, cluster, distance, device="cpu")[0] >= 0).sum() == 2
assert prune.prune_by_complexity(cluster, distance, found.centroids, 3).sum() == 3
try:
    kmeans.fit(x, 2, backend="faiss", device="cpu")
except ImportError as error:
    assert "pip install 'curate-distill[cpu]'" in str(error)
else:
    raise AssertionError("faiss was not there, and nothing said so")
"""


def test_kernels_need_only_numpy_and_torch():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
