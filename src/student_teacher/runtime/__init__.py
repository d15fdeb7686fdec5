"""What knows nothing of images or networks: errors, options, devices, processes, files."""
