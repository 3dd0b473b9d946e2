"""Replace functions of Keras that decide for one process what concerns all ranks.

Each module says what Keras does, why that is wrong on several ranks, and what is put in its place.
`hvdtrain doctor --patches` lists all replaced functions. Checked with Keras 3.5 to 3.15.
"""
