"""The parts of fsdp_train.py, in reading order:

config.py           flags and recipes → one frozen TrainConfig
job.py              a run's inputs, read and checked
objectives.py       what a step minimizes: the loss of answers, of preferences, of rewards
group.py            the model's own answers and their rewards, for the last
parallel.py         one model on many ranks: checkpointing, compilation, FSDP, sharded weights
snapshots.py        the state of a run on disk, to resume from
run_dir.py          the folder of a run: settings, log, lock
plot.py             its losses as a picture, also of several runs
process.py          signals and exit codes
throughput.py       numbers of parameters and operations, MFU
memory_plan.py      `--plan`: memory and hours, estimated before training
model_card.py       the card beside the trained model
result.py           held-out figures, the trained model, its answers
"""
