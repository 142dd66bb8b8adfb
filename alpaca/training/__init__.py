"""What fsdp_train.py stands on: sharding, snapshots, the run's folder, the memory plan."""
