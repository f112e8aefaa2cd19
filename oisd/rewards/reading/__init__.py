"""What a careful reader sees in the content of a box: text to tokens to trees."""

from oisd.rewards.reading.answers import read
from oisd.rewards.reading.tokens import NeedsAlgebra, Unreadable
from oisd.rewards.reading.trees import Tree, has, nodes, num, replaced

__all__ = ["NeedsAlgebra", "Tree", "Unreadable", "has", "nodes", "num", "read", "replaced"]
