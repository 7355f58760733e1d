"""The parts of benchmarks/soak.py: what is asked, the clients, the processes' memory, the verdict."""
