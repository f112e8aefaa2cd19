"""What is measured, as data: `case.py` says what a case is, `suite.py` lists them all."""
