"""The parts that don't depend on images or networks: errors, options, devices, processes, files."""
