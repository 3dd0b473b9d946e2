"""Run collective operations on NumPy arrays over all ranks: one interface, one implementation per engine."""
