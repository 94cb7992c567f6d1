"""Running on several devices and hosts: cluster setup, failure detection, sharding, determinism."""
