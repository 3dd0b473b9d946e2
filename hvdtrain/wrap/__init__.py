"""Run scripts written for one process on several ranks: `hvdtrain run --wrap -np 4 train.py`.

Every rank runs the whole script in the same order as the others: with the same random numbers, the same batches and
the same weights. The ranks divide only the work inside the model: see `row_shard.py` and `model_calls.py`.
"""
