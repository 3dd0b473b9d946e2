"""Scripts that know nothing of ranks, on several: `hvdtrain run --wrap -np 4 train.py`.

Every rank runs the whole script, in step with the others: the same random numbers, the same batches, the same
weights. What is divided among them is the work inside the model: see `row_shard.py` and `model_calls.py`.
"""
