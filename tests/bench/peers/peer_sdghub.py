import os
import sys

os.environ.update(LITELLM_LOCAL_MODEL_COST_MAP="True")
import pandas as pd  # noqa: E402
from common import Run  # noqa: E402
from sdg_hub.core.blocks import LLMChatBlock  # noqa: E402

url, n, c = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
block = LLMChatBlock(
    block_name="g",
    input_cols="messages",
    output_cols="out",
    model="openai/mock",
    api_base=f"{url}/v1",
    api_key="x",
    async_mode=True,
)
frame = pd.DataFrame({"messages": [[{"role": "user", "content": f"p{i}"}] for i in range(n)]})
run = Run("sdghub")
rows = block(frame, _flow_max_concurrency=c)
run.ended(len(rows))
