import torch
from hypothesis import settings

# Deadlines measure the machine, and workers of pytest-xdist share its cores.
settings.register_profile("rmprune", deadline=None)
settings.load_profile("rmprune")
torch.set_num_threads(1)
