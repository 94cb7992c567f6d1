"""What a run would take on a TPU pod, asked of the TPU compiler on a machine without one."""
