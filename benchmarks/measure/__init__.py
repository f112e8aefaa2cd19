"""How it is measured: time, memory, roofline, counts, the machine."""
