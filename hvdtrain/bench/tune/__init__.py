"""`hvdtrain tune`: tries what can be set in MPI, Horovod and the C library, and keeps what is faster here."""
