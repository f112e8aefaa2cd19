"""`oisd report`: one HTML page about a run of `oisd train`, or about several side by side."""
