"""The run's interface to the machine: devices, processes, files, signals and error reports."""
