"""What fsdp_train.py stands on. Read in this order:

config.py           flags and recipes → one frozen TrainConfig
parallel.py         one model on many ranks: checkpointing, compilation, FSDP, sharded weights
snapshots.py        the state of a run on disk, to resume from
run_dir.py          the folder of a run: settings, log, lock
process.py          signals, and the end of a process
throughput.py       parameters, operations, MFU
memory_plan.py      `--plan`: memory and hours before they are spent
simulate.py         `--plan --simulate`: the memory of a step without data, to compare
model_card.py       the card beside the trained model
sample_answers.py   its answers to held-out instructions
"""
