"""The contestants: one file each, each run in a process of its own (serve.py) that speaks protocol.py."""

from __future__ import annotations

# Contestants in Python: name on the command line -> module of this package. Modules import their library
# in Peer.__init__, and nothing but it and NumPy, so that any interpreter that has both can run them.
MODULES = {
    "batchnorm": "ours",
    "numpy.copyto": "numpy_copy",
    "torch": "torch_native",
    "numba": "numba_loop",
    "onnxruntime": "onnxruntime_session",
    "jax": "jax_jit",
    "tensorflow": "tensorflow_function",
    "numpy": "numpy_loop",
}

# Contestants that are programs of bench/cpp: name -> (program, arguments before the number of threads).
PROGRAMS = {
    "bandwidth": ("bandwidth", []),
    "onednn": ("onednn_peer", ["plain"]),
    "onednn-blocked": ("onednn_peer", ["blocked"]),
}

# Those that may be asked for by --peers, in the order of the table.
PEERS = ("torch", "onednn", "onednn-blocked", "numba", "onnxruntime", "jax", "tensorflow", "numpy")
