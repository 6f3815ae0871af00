"""What checks the types of our functions while tests run: beartype, to which a whole number is a float (PEP 484)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
