"Triton's kernels run in its interpreter where there is no GPU; the choice must be made before anything imports triton."
import os

import torch

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")
