"""The checks of tools/check_gpu.py, each of which runs in a process of its own."""
