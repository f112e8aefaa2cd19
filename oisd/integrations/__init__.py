"""OISD inside other people's trainers: one module each, imported by its own name.

    from oisd.integrations.trl import OISDConfig, OISDTrainer

Nothing is imported here, so that `import oisd` needs none of them, and they need not be installed
together.
"""
