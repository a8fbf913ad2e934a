"""What an engine on a device can do, without a fleet: `python -m services.worker.benchmark.engine`, or `.profile`."""
