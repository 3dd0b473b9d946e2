"""Names that scripts import from `horovod.common`; hvdtrain itself does not use them."""
