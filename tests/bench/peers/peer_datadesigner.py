import os
import pathlib
import sys
import tempfile

os.environ.update(MOCK_KEY="x", NEMO_TELEMETRY_ENABLED="false")
import data_designer.config as dd  # noqa: E402
from common import Run  # noqa: E402
from data_designer.interface import DataDesigner  # noqa: E402

url, n, c = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
provider = dd.ModelProvider(name="mock", endpoint=f"{url}/v1", provider_type="openai", api_key="MOCK_KEY")
designer = DataDesigner(model_providers=[provider], artifact_path=pathlib.Path(tempfile.mkdtemp()))
designer.set_run_config(
    dd.RunConfig(buffer_size=1000, otel_metrics_port=None, disable_early_shutdown=True, max_in_flight_tasks=max(1024, c))
)
model = dd.ModelConfig(
    alias="m", model="mock", provider="mock", inference_parameters=dd.ChatCompletionInferenceParams(max_parallel_requests=c)
)
builder = dd.DataDesignerConfigBuilder(model_configs=[model])
builder.add_column(dd.SamplerColumnConfig(name="i", sampler_type=dd.SamplerType.UUID, params=dd.UUIDSamplerParams()))
builder.add_column(dd.LLMTextColumnConfig(name="out", model_alias="m", prompt="p {{ i }}"))
run = Run("datadesigner")
result = designer.create(builder, num_records=n, dataset_name="d")
run.ended(len(result.load_dataset()))
