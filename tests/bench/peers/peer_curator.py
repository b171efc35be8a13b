import os
import sys
import tempfile

os.environ.update(
    OPENAI_API_KEY="x",
    TELEMETRY_ENABLED="false",
    HF_HUB_OFFLINE="1",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    CURATOR_CACHE_DIR=tempfile.mkdtemp(),
)
from bespokelabs import curator  # noqa: E402
from common import Run  # noqa: E402

url, n, c = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
llm = curator.LLM(
    model_name="gpt-4o-mini",
    backend="openai",
    backend_params=dict(
        base_url=f"{url}/v1",
        max_requests_per_minute=10**7,
        max_tokens_per_minute=10**10,
        max_concurrent_requests=c,
        max_retries=5,
        require_all_responses=False,
    ),
)
run = Run("curator")
rows = llm([f"p{i}" for i in range(n)])
run.ended(len(rows.dataset))
