"""Does OISD help? A study whose protocol is fixed before its first counted run: docs/study.md."""
