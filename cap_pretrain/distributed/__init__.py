"""Running on several devices and hosts: clusters, lost hosts, sharding, determinism, GPUs, TPUs."""
